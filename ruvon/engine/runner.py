"""Runner: one step on one device, from a `Plan` to a `StepResult`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from ruvon.engine.batch import build_batch
from ruvon.engine.sampler import score_prompts
from ruvon.engine.types import Plan, SamplingRow, StepResult
from ruvon.kernels.ops import ForwardBatch

Forward: TypeAlias = Callable[[ForwardBatch], Tensor]
"""float32 logits [L, V] of the batch's ``logit_rows``; fills the cache it was made with."""

Sampler: TypeAlias = Callable[[Tensor, Sequence[SamplingRow]], StepResult]


class Runner:
    """Computes steps one at a time, in a thread of its own, so that an event loop may turn
    meanwhile: torch and numpy let go of the interpreter while they compute.

    ``max_logit_rows`` bounds the logits in memory at once; at least the most sequences of a step.
    """

    def __init__(
        self,
        forward: Forward,
        sampler: Sampler,
        *,
        block_size: int,
        device: torch.device,
        max_logit_rows: int,
    ) -> None:
        self._forward = forward
        self._sampler = sampler
        self._block_size = block_size
        self._device = device
        self._max_logit_rows = max_logit_rows
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="ruvon-step")

    def launch(self, plan: Plan) -> Future[StepResult]:
        """Begin a step. The future holds its result, or whatever went wrong."""
        return self._worker.submit(self._run, plan)

    def close(self) -> None:
        """Finish the step under way and end the thread."""
        self._worker.shutdown()

    def _run(self, plan: Plan) -> StepResult:
        began = time.perf_counter()
        with torch.inference_mode():
            batch = build_batch(plan, self._block_size, self._device)
            pieces = self._logits(batch)
            first = next(pieces)
            sampled = self._sampler(first[: len(plan.rows)], plan.rows)
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
        for rows in torch.split(batch.logit_rows, self._max_logit_rows):
            yield self._forward(replace(batch, logit_rows=rows))
