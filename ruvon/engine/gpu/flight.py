"""Steps in flight: the memory they leave their results in, and the future that takes them down."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ruvon.engine.gpu.graphs import Box
from ruvon.engine.sampler import LOWEST_LOGPROB
from ruvon.engine.types import Plan, SamplingRow, StepResult, TokenLogprobs
from ruvon.kernels import sample

ERRORS = {
    sample.NOT_A_NUMBER: "the model computed logits that are not numbers (NaN)",
    sample.INFINITE: "the model computed an infinite logit",
    sample.NOTHING_LEFT: "no token is left: every one is ruled out by what the request bans or "
    "allows",
}


@dataclass(frozen=True, slots=True)
class Flight:
    """A launched step."""

    plan: Plan
    special: list[tuple[int, SamplingRow]]  # rows that want more than their likeliest token
    box: Box
    began: float
    tops: dict[int, tuple[Tensor, Tensor]]  # row → log-probabilities and ids of alternatives
    logits_LV: Tensor  # until the next is launched

    def wait(self) -> None:
        if self.box.done is not None:
            self.box.done.synchronize()

    def is_over(self) -> bool:
        """Whether `wait` would return at once."""
        return self.box.done is None or bool(self.box.done.query())


class StepFuture(Future[StepResult]):
    """A step under way. It is over when the device says so, whoever looks first."""

    def __init__(self, flight: Flight, waiter: Executor) -> None:
        super().__init__()
        self._flight = flight
        self._waiter = waiter
        self._landing = Lock()

    def done(self) -> bool:
        """Whether the device is: then `result` takes down what it left, without waiting."""
        return super().done() or self._flight.is_over()

    def result(self, timeout: float | None = None) -> StepResult:
        """Waits for the device, however long that takes."""
        self.land()
        return super().result(timeout)

    def add_done_callback(self, fn: Callable[[Future[StepResult]], object]) -> None:
        super().add_done_callback(fn)
        if not super().done():
            self._waiter.submit(self.land)

    def land(self) -> None:
        """Take the results down, once the device has them, if nobody has."""
        with self._landing:
            if super().done():
                return
            try:
                result = land(self._flight)
            except BaseException as error:
                self.set_exception(error)
            else:
                self.set_result(result)


def alternatives(
    special: Sequence[tuple[int, SamplingRow]], logits_LV: Tensor
) -> dict[int, tuple[Tensor, Tensor]]:
    """For rows that want them, the likeliest tokens and their log-probabilities, on the way to
    the host."""
    tops = {}
    with torch.inference_mode():
        for i, row in special:
            if row.sampling.logprobs:
                values, ids = logits_LV[i].log_softmax(-1).topk(row.sampling.logprobs)
                tops[i] = (to_host(values), to_host(ids))
    return tops


def to_host(values: Tensor) -> Tensor:
    if not values.is_cuda:
        return values
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)


def land(flight: Flight) -> StepResult:
    """Wait for a step and take its results down."""
    flight.wait()
    rows = flight.plan.rows
    tokens, logprobs, ranks = flight.box.results
    drawn = tokens[: len(rows)].tolist()
    scores: list[tuple[TokenLogprobs, ...] | None] = [None] * len(rows)
    scored = [i for i, row in flight.special if row.sampling.logprobs is not None]
    if scored:
        values, places = logprobs.view(np.float32).tolist(), ranks.tolist()
        for i in scored:
            scores[i] = (score(drawn[i], values[i], places[i], flight.tops.get(i)),)
    errors = {}
    if drawn and min(drawn) < 0:
        failed = [(i, code) for i, code in enumerate(drawn) if code < 0]
        errors = {rows[i].seq_id: ERRORS[code] for i, code in failed}
    return StepResult(
        tokens=tuple([(token,) if token >= 0 else () for token in drawn]),
        logprobs=tuple(scores),
        errors=errors,
        seconds=time.perf_counter() - flight.began,
    )


def score(
    token: int, logprob: float, rank: int, top: tuple[Tensor, Tensor] | None
) -> TokenLogprobs:
    pairs: Any = () if top is None else zip(top[1].tolist(), top[0].tolist(), strict=True)
    alternatives = tuple((i, max(value, LOWEST_LOGPROB)) for i, value in pairs)
    return TokenLogprobs(token, max(logprob, LOWEST_LOGPROB), rank, alternatives)
