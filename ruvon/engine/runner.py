"""Runner: one step on one device, from a `Plan` to a `StepResult`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import chain
from queue import SimpleQueue
from threading import Thread
from typing import TypeAlias

import torch
from torch import Tensor

from ruvon.engine.batch import Layout, lay_out
from ruvon.engine.sampler import score_prompts
from ruvon.engine.types import UNDRAWN, Chunk, Plan, SamplingRow, StepResult
from ruvon.kernels.ops import ForwardBatch

Forward: TypeAlias = Callable[[ForwardBatch], Tensor]
"""float32 logits [L, V] of the batch's ``logit_rows``; fills the cache it was made with."""

Sampler: TypeAlias = Callable[[Tensor, Sequence[SamplingRow]], StepResult]

PATIENCE = 10.0  # seconds for the steps under way when a runner closes


class Runner:
    """Computes steps one after another, in a thread of its own, so that an event loop may turn
    meanwhile: torch and numpy let go of the interpreter while they compute.

    ``depth`` is how many steps it takes before the first is done, 1 or 2; ``max_logit_rows`` bounds
    the logits in memory at once, and is at least the most sequences of a step. ``at_start`` is
    called first in that thread. ``device`` is where batches go; None for what takes numpy arrays.
    """

    long_step = 64  # tokens: a prompt's step takes many times as long as the host does for it

    def __init__(
        self,
        forward: Forward,
        sampler: Sampler,
        *,
        block_size: int,
        device: torch.device | None,
        max_logit_rows: int,
        depth: int = 2,
        at_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.depth = depth
        self._forward = forward
        self._sampler = sampler
        self._block_size = block_size
        self._device = device
        self._max_logit_rows = max_logit_rows
        self._at_start = at_start
        self._launched: SimpleQueue[tuple[Plan, Layout, Future[StepResult]] | None] = SimpleQueue()
        self._closed = False
        # A daemon, for a step that is stuck must not keep the process alive.
        self._worker = Thread(target=self._work, name="ruvon-step", daemon=True)
        self._worker.start()

    def launch(self, plan: Plan) -> Future[StepResult]:
        """Begin a step, or line it up. The future holds its result, or whatever went wrong.

        The batch is laid out here, by the calling thread: the step before may still run.
        """
        future: Future[StepResult] = Future()
        if self._closed:  # nobody would ever compute it
            future.set_exception(RuntimeError("the runner is closed"))
            return future
        try:
            self._launched.put((plan, lay_out(plan, self._block_size), future))
        except Exception as error:
            future.set_exception(error)
        return future

    @property
    def lost(self) -> bool:
        """Whether it was closed; the thread outlives whatever a step raises."""
        return self._closed

    def close(self) -> None:
        """Finish what has been launched and end the thread, unless that is stuck."""
        self._closed = True
        self._launched.put(None)
        self._worker.join(PATIENCE)

    def _work(self) -> None:
        broken: BaseException | None = None
        try:
            self._at_start()
        except BaseException as error:  # nobody waits here, but somebody will for the first step
            broken = error
        drawn: Mapping[int, int] = {}
        while (launched := self._launched.get()) is not None:
            plan, layout, future = launched
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if broken is not None:
                    raise broken
                result = self._run(plan, layout, drawn)
            except BaseException as error:
                drawn = {}
                future.set_exception(error)
            else:
                future.set_result(result)
                drawn = {
                    row.seq_id: tokens[0]
                    for row, tokens in zip(plan.rows, result.tokens, strict=True)
                    if tokens
                }

    def _run(self, plan: Plan, layout: Layout, drawn: Mapping[int, int]) -> StepResult:
        """Compute a step; ``drawn`` are the tokens of the step before, by sequence."""
        began = time.perf_counter()
        with torch.inference_mode():
            batch = layout.to_batch(self._device, drawn)
            pieces = self._logits(batch)
            first = next(pieces)
            sampled = self._sampler(first[: len(plan.rows)], complete_rows(plan, drawn))
            scores = score_prompts(chain((first[len(plan.rows) :],), pieces), plan.prompt_rows)
        return replace(
            sampled,
            prompt_logprobs=scores.logprobs,
            errors={**sampled.errors, **scores.errors},
            seconds=time.perf_counter() - began,
        )

    def _logits(self, batch: ForwardBatch) -> Iterator[Tensor]:
        """The rows wanted, a bounded number at a time.

        Only prompt logprobs want more than one row a sequence. For them the step is computed
        again: it writes the same keys and values to the same slots, and memory stays bounded.
        """
        if len(batch.logit_rows) <= self._max_logit_rows:
            yield self._forward(batch)
            return
        for first in range(0, len(batch.logit_rows), self._max_logit_rows):
            rows = batch.logit_rows[first : first + self._max_logit_rows]
            yield self._forward(replace(batch, logit_rows=rows))


def complete_rows(plan: Plan, drawn: Mapping[int, int]) -> list[SamplingRow]:
    """The plan's rows with the history that this step draws from, whatever has been committed or
    not by now: all up to the end of its chunk, which may have been undrawn when it was planned."""
    ends = [chunk for chunk in plan.chunks if chunk.samples]
    return [
        row if row.plain else replace(row, history=history(row, chunk, drawn))
        for row, chunk in zip(plan.rows, ends, strict=True)
    ]


def history(row: SamplingRow, chunk: Chunk, drawn: Mapping[int, int]) -> list[int]:
    tokens = chunk.tokens
    if tokens == (UNDRAWN,):
        tokens = (drawn.get(row.seq_id, 0),)
    return [*row.history[: chunk.start], *tokens]
