"""Steps in flight: where they leave their results, and the future that reads them back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ruvon.engine.batch import to_device
from ruvon.engine.draw import INFINITE, NOT_A_NUMBER, NOTHING_LEFT
from ruvon.engine.gpu.graphs import StagingBuffer
from ruvon.engine.gpu.scoring import PooledSum, PromptScores, to_host
from ruvon.engine.logprobs import finite
from ruvon.engine.matching import Masks
from ruvon.engine.pooling import broken
from ruvon.engine.types import Plan, StepResult, TokenLogprobs
from ruvon.kernels import sample, scores

ERRORS = {
    sample.NOT_A_NUMBER: NOT_A_NUMBER,
    sample.INFINITE: INFINITE,
    sample.NOTHING_LEFT: NOTHING_LEFT,
}


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A launched step."""

    plan: Plan
    staging: StagingBuffer
    began: float
    tops: Mapping[int, Alternatives | None]  # of rows whose logprobs are wanted
    scores: Sequence[PromptScores]
    pooled: Sequence[PooledSum] = ()
    masks: Masks | None = None  # once they are there, all of the step has been launched

    def wait(self) -> None:
        if self.masks is not None:
            self.masks.wait()
        if self.staging.done is not None:
            self.staging.done.synchronize()

    def is_over(self) -> bool:
        """Whether `wait` would return at once."""
        return self.staging.done is None or bool(self.staging.done.query())


class StepFuture(Future[StepResult]):
    """A step in flight. It is over when the device says so, whoever looks first.

    ``take``: what is to be made of its result. What another step does only then is done by whoever
    looks, before anybody else is told.
    """

    def __init__(
        self, step: InFlightStep, take: Callable[[InFlightStep, StepResult], StepResult],
        waiter: Executor,
    ) -> None:  # fmt: skip
        super().__init__()
        self.step = step
        self._take = take
        self._waiter = waiter
        self._reading, self._following = Lock(), Lock()
        self._next: Callable[[], object] | None = None
        self._was_read = False

    def call_when_read(self, call: Callable[[], object]) -> bool:
        """Whether ``call``, the only one, will be called; not if the step has been read back."""
        with self._following:
            if not self._was_read:
                self._next = call
            return not self._was_read

    def done(self) -> bool:
        """Whether `result` returns at once, or has little to read back. Scores of a long prompt
        are much, and so are masks: they are left to the waiting thread."""
        step = self.step
        much = step.scores or step.masks is not None or self._next is not None
        return super().done() or (not much and step.is_over())

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
                result = self._take(self.step, read_back(self.step))
            except BaseException as error:
                self._follow()
                self.set_exception(error)
            else:
                self._follow()
                self.set_result(result)

    def _follow(self) -> None:
        with self._following:
            self._was_read = True
        if self._next is not None:
            self._next()


@dataclass(frozen=True, slots=True)
class Alternatives:
    """A row's likeliest tokens, on the way to the host."""

    logprobs: Tensor
    ids: Tensor


def alternatives(
    logits_LV: Tensor, wanted: Mapping[int, int | tuple[int, ...]]
) -> dict[int, Alternatives | None]:
    """The likeliest tokens of some rows of logits: row → how many are ``wanted``, or which.

    All rows' norms come from one kernel, for torch's own sum of a row depends on where it begins in
    memory, and so on its place in the batch.
    """
    if not any(wanted.values()):
        return dict.fromkeys(wanted)
    with torch.inference_mode():
        norm_L, _ = scores.score(logits_LV, torch.zeros_like(logits_LV[:, 0], dtype=torch.int32))
        tops: dict[int, Alternatives | None] = dict.fromkeys(wanted)
        for i, num in wanted.items():
            if num:
                values, ids = pick(logits_LV[i], num)
                tops[i] = Alternatives(to_host(values - norm_L[i]), to_host(ids))
        return tops


def pick(logits_V: Tensor, wanted: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The logits and ids of the likeliest tokens, so many, or of those that are wanted."""
    if isinstance(wanted, int):
        top = logits_V.topk(min(wanted, logits_V.shape[0]))
        return top.values, top.indices
    (ids,) = to_device((np.array(wanted, dtype=np.int32),), logits_V.device)
    return logits_V[ids.long()], ids


def read_back(step: InFlightStep) -> StepResult:
    """Wait for a step and read its results."""
    step.wait()
    rows = step.plan.rows
    tokens, logprobs, ranks = step.staging.results.numpy()
    sampled = tokens[: len(rows)].tolist()
    scores: list[tuple[TokenLogprobs, ...] | None] = [None] * len(rows)
    if step.tops:
        values, places = logprobs.view(np.float32).tolist(), ranks.tolist()
        for i, top in step.tops.items():
            scores[i] = (score(sampled[i], values[i], places[i], top),)
    errors = {}
    if sampled and min(sampled) < 0:
        errors = {rows[i]: ERRORS[code] for i, code in enumerate(sampled) if code < 0}
    prompts = {}
    for prompt in step.scores:
        prompts[prompt.row.seq_id], error = prompt.read()
        if error is not None:
            errors.setdefault(prompt.row.seq_id, error)
    sums = {each.seq_id: each.sum_C.numpy() for each in step.pooled}
    errors.update(broken(sums))
    return StepResult(
        tokens=tuple([(token,) if token >= 0 else () for token in sampled]),
        logprobs=tuple(scores),
        prompt_logprobs=prompts,
        pooled=sums,
        errors=errors,
        seconds=time.perf_counter() - step.began,
    )


def score(token: int, logprob: float, rank: int, top: Alternatives | None) -> TokenLogprobs:
    pairs: Any = ()
    if top is not None:
        pairs = zip(top.ids.tolist(), top.logprobs.tolist(), strict=True)
    return TokenLogprobs(token, finite(logprob), rank, tuple((i, finite(v)) for i, v in pairs))
