"""Runner: one step on one device, from a `Plan` to a `StepResult`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import chain
from queue import SimpleQueue
from threading import Thread
from typing import TypeAlias

import torch
from torch import Tensor

from ruvon.engine.batch import BlockTables, PendingBatch, Windows, lay_out
from ruvon.engine.logprobs import score_prompts
from ruvon.engine.matching import Matchers, with_grammar
from ruvon.engine.pooling import broken, places, pool
from ruvon.engine.types import BEING_SAMPLED, Plan, SamplingParams, SamplingRow, StepResult
from ruvon.kernels.ops import ForwardBatch

Forward: TypeAlias = Callable[[ForwardBatch], Tensor]
"""float32 logits [L, V] of the batch's ``logit_rows``; fills the cache it was made with."""

Hidden: TypeAlias = Callable[[ForwardBatch], Tensor]
"""The final hidden states [L, C] of the batch's ``logit_rows``; fills the cache as well."""

Sampler: TypeAlias = Callable[[Tensor, Sequence[SamplingRow]], StepResult]

PATIENCE = 10.0  # seconds for the steps under way when a runner closes


class Runner:
    """Computes steps one after another, in a thread of its own, so that an event loop may turn
    meanwhile: torch and numpy let go of the interpreter while they compute.

    ``depth`` is how many steps it takes before the first is done, 1 or 2; ``max_logit_rows`` bounds
    the logits in memory at once, and is at least the most sequences of a step. ``hidden`` may be
    missing where no plan has ``pooled_rows``. ``at_start`` is called first in that thread.
    ``device`` is where batches go; None for what takes numpy arrays. ``matchers`` see to rows with
    a grammar, ``windows`` are those of the model's cache groups. Where it ``samples`` not, it is a
    stage before the last: ``forward`` and ``hidden`` send on what they make, and no row has tokens.
    """

    grammar_depth = (
        1  # forced tokens cost least in one chunk, and masks have nothing to hide behind
    )
    long_step = 64  # tokens: a prompt's step takes many times as long as the host does for it

    def __init__(  # noqa: PLR0913, what a runner depends on
        self,
        forward: Forward,
        sampler: Sampler,
        *,
        hidden: Hidden | None = None,
        block_size: int,
        windows: Windows = (0,),
        device: torch.device | None,
        max_logit_rows: int,
        depth: int = 2,
        at_start: Callable[[], None] = lambda: None,
        matchers: Matchers | None = None,
        samples: bool = True,
    ) -> None:
        self.depth = depth
        self._forward = forward
        self._sampler = sampler
        self._hidden = hidden
        self._block_size = block_size
        self._windows = windows
        self._device = device
        self._max_logit_rows = max_logit_rows
        self._at_start = at_start
        self._matchers = matchers
        self._samples = samples
        self._tables = BlockTables()
        self._launched: SimpleQueue[Launched | None] = SimpleQueue()
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
        self._tables.follow(plan)
        layout: PendingBatch | Exception
        try:
            layout = lay_out(plan, self._tables, self._block_size, self._windows)
        except Exception as error:  # in its turn, for the next step goes on from this plan
            layout = error
        self._launched.put((plan, layout, future))
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
        if self._matchers is not None:
            self._matchers.close()

    def _work(self) -> None:
        broken: BaseException | None = None
        try:
            self._at_start()
        except BaseException as error:  # nobody waits here, but somebody will for the first step
            broken = error
        rows = SamplingRows()
        while (launched := self._launched.get()) is not None:
            plan, layout, future = launched
            try:
                rows.follow(plan)
                if self._matchers is not None:
                    self._matchers.follow(plan)
                if not future.set_running_or_notify_cancel():
                    continue
                if broken is not None:
                    raise broken
                if isinstance(layout, Exception):
                    raise layout
                result = self._run(plan, layout, rows)
            except BaseException as error:
                future.set_exception(error)
            else:
                rows.record(plan, result.tokens)
                future.set_result(result)

    def _run(self, plan: Plan, layout: PendingBatch, rows: SamplingRows) -> StepResult:
        began = time.perf_counter()
        with torch.inference_mode():
            if not self._samples:
                result = self._send_on(plan, layout, rows)
            elif len(plan.pooled_rows) == len(plan.chunks):
                result = NOTHING  # all that is wanted are hidden states
            else:
                result = self._sample(plan, layout.to_batch(self._device, rows), rows)
            if plan.pooled_rows and self._samples:
                result = self._pool(plan, layout, rows, result)
        return replace(result, seconds=time.perf_counter() - began)

    def _send_on(self, plan: Plan, layout: PendingBatch, rows: SamplingRows) -> StepResult:
        """What the next stages will ask for, as often as they will."""
        batch = layout.to_batch(self._device, rows)
        if len(plan.pooled_rows) < len(plan.chunks):
            deque(self._logits(batch), 0)
        if plan.pooled_rows:
            pooled = places(plan.pooled_rows, layout.query_starts)
            assert self._hidden is not None
            self._hidden(replace(layout, logit_rows=pooled).to_batch(self._device, rows))
        return StepResult(((),) * len(plan.rows), (None,) * len(plan.rows))

    def _sample(self, plan: Plan, batch: ForwardBatch, rows: SamplingRows) -> StepResult:
        pieces = self._logits(batch)
        sampling = [rows[seq_id] for seq_id in plan.rows]
        masks = self._matchers and self._matchers.begin(with_grammar(sampling))
        first = next(pieces)
        if masks:
            masks.hand_to(sampling)
        sampled = self._sampler(first[: len(plan.rows)], sampling)
        if masks and self._matchers:
            sampled = self._matchers.accept(plan.rows, masks, sampled)
        scores = score_prompts(chain((first[len(plan.rows) :],), pieces), plan.prompt_rows)
        return replace(
            sampled, prompt_logprobs=scores.logprobs, errors={**sampled.errors, **scores.errors}
        )

    def _pool(
        self, plan: Plan, layout: PendingBatch, rows: SamplingRows, result: StepResult
    ) -> StepResult:
        """``result`` with hidden states, for which the step is computed again where it has been:
        it writes the same keys and values to the same slots."""
        pooled = places(plan.pooled_rows, layout.query_starts)
        batch = replace(layout, logit_rows=pooled).to_batch(self._device, rows)
        assert self._hidden is not None
        sums = pool(self._hidden(batch), plan.pooled_rows)
        return replace(result, pooled=sums, errors={**result.errors, **broken(sums)})

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


NOTHING = StepResult((), ())

Launched: TypeAlias = tuple[Plan, PendingBatch | Exception, Future[StepResult]]


class SamplingRows(dict[int, SamplingRow]):
    """What a sampler is told of every sequence: kept from a stream of plans, each followed once and
    in order, and from what has been sampled for them."""

    def __init__(
        self, looks_back: Callable[[SamplingParams], bool] = lambda sampling: True
    ) -> None:
        """``looks_back``: whose history is kept, for its sampling depends on it."""
        self._looks_back = looks_back
        self._histories: dict[int, list[int]] = {}

    def follow(self, plan: Plan) -> None:
        """Take in what a plan says. All steps before the latest have been recorded."""
        for seq_id in plan.ended:
            self._forget(seq_id)
        for new in plan.new:
            self._forget(new.seq_id)
            row = SamplingRow(new.seq_id, new.sampling, [*new.prefix], new.num_prompt, new.seed)
            self[new.seq_id] = row
            if self._looks_back(new.sampling):
                self._histories[new.seq_id] = row.history
        if self._histories:
            for chunk in plan.chunks:
                if chunk.tokens != BEING_SAMPLED and chunk.seq_id in self._histories:
                    self._histories[chunk.seq_id][chunk.start :] = chunk.tokens

    def _forget(self, seq_id: int) -> None:
        self.pop(seq_id, None)
        self._histories.pop(seq_id, None)

    def record(self, plan: Plan, tokens: Sequence[tuple[int, ...]]) -> None:
        """Take in what a step has sampled: the next may go on with it."""
        if not self._histories:
            return
        ends = [chunk.start + len(chunk.tokens) for chunk in plan.chunks if chunk.samples]
        for seq_id, end, sampled in zip(plan.rows, ends, tokens, strict=True):
            history = self._histories.get(seq_id)
            if history is not None and len(history) == end:  # or it has been told already
                history += sampled
