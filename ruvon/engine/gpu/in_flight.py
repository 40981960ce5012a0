"""Steps in flight: futures that read back what the device has left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from threading import Lock
from typing import Any

import numpy as np
from torch import Tensor

from ruvon.engine.draw import INFINITE, NOT_A_NUMBER, NOTHING_LEFT
from ruvon.engine.gpu.graphs import StagingBuffer
from ruvon.engine.gpu.scoring import PromptScores, Top
from ruvon.engine.logprobs import entry
from ruvon.engine.matching import Masks
from ruvon.engine.pooling import broken
from ruvon.engine.types import Plan, StepResult, TokenLogprobs
from ruvon.kernels import sample

ERRORS = {
    sample.NOT_A_NUMBER: NOT_A_NUMBER,
    sample.INFINITE: INFINITE,
    sample.NOTHING_LEFT: NOTHING_LEFT,
}


class InFlightStep(Future[StepResult]):
    """A launched step. It is over when the device says so, whoever looks first.

    What another step does only then is done by whoever looks, before anybody else is told.
    """

    def __init__(
        self,
        plan: Plan,
        staging: StagingBuffer,
        began: float,
        scores: Mapping[int, PromptScores],
        sums: Mapping[int, Tensor],
        take: Callable[[InFlightStep, StepResult], StepResult],
        waiter: Executor,
    ) -> None:
        """``take``: what is to be made of its result."""
        super().__init__()
        self.plan = plan
        self.staging = staging
        self.scores = scores
        self.sums = sums
        self.tops: Mapping[int, Top] = {}  # of rows whose logprobs are wanted
        self.masks: Masks | None = None  # once they are there, all of it has been launched
        self.was_read: Future[None] = Future()
        self._began = began
        self._take = take
        self._waiter = waiter
        self._reading = Lock()
        self._leads_on = False

    def end(self, stream: Any) -> None:
        """Nothing is launched for it any more."""
        if self.staging.done is not None:
            self.staging.done.record(stream)

    def call_when_read(self, call: Callable[[], object]) -> None:
        """At once, if it has been."""
        self._leads_on = True
        self.was_read.add_done_callback(lambda _: call())

    def done(self) -> bool:
        """Whether `result` returns at once, or has little to read back. Scores of a long prompt
        are much, and so are masks: they are left to the waiting thread."""
        if super().done():
            return True
        much = self.scores or self.masks is not None or self._leads_on
        return not much and (self.staging.done is None or bool(self.staging.done.query()))

    def result(self, timeout: float | None = None) -> StepResult:
        """Waits for the device, however long that takes."""
        if not super().done():  # as it is for who is called back while it is being read
            self.read_back()
        return super().result(timeout)

    def add_done_callback(self, fn: Callable[[Future[StepResult]], object]) -> None:
        super().add_done_callback(fn)
        if not super().done():
            self._waiter.submit(self.read_back)

    def read_back(self) -> None:
        """Take the results in, once the device has them, if nobody has."""
        with self._reading:
            if super().done():
                return
            try:
                result = self._take(self, self._read())
            except BaseException as error:
                self.was_read.set_result(None)
                self.set_exception(error)
            else:
                self.was_read.set_result(None)
                self.set_result(result)

    def _read(self) -> StepResult:
        if self.masks is not None:
            self.masks.wait()
        if self.staging.done is not None:
            self.staging.done.synchronize()
        rows = self.plan.rows
        tokens, logprobs, ranks = self.staging.results.numpy()
        sampled = tokens[: len(rows)].tolist()
        told: list[tuple[TokenLogprobs, ...] | None] = [None] * len(rows)
        if self.tops:
            values, places = logprobs.view(np.float32).tolist(), ranks.tolist()
            for i, (ids, others) in self.tops.items():
                about = (values[i], places[i], ids.tolist(), others.tolist())
                told[i] = (entry(sampled[i], *about),)
        errors = {}
        if sampled and min(sampled) < 0:
            errors = {rows[i]: ERRORS[code] for i, code in enumerate(sampled) if code < 0}
        prompts = {}
        for seq_id, scores in self.scores.items():
            prompts[seq_id], error = scores.read()
            if error is not None:
                errors.setdefault(seq_id, error)
        sums = {seq_id: sum_C.numpy() for seq_id, sum_C in self.sums.items()}
        errors.update(broken(sums))
        return StepResult(
            tokens=tuple([(token,) if token >= 0 else () for token in sampled]),
            logprobs=tuple(told),
            prompt_logprobs=prompts,
            pooled=sums,
            errors=errors,
            seconds=time.perf_counter() - self._began,
        )
