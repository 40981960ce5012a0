"""GpuRunner: steps as graph replays, launched without waiting for the step before.

`launch` turns a plan into words, sends them and replays a graph, which takes the host a fraction of
a millisecond. Whoever asks for the result waits for the device and takes the tokens down; a thread
waits only for those who want to be called. Where a chunk has `UNDRAWN`
for a token, the device fills in what the sequence's seat drew last.

What only the host can do, it does with the logits such a step leaves behind, before anything else
is launched: draws that look at all drawn tokens or sort the vocabulary (`draws_on_host`), and
prompt logprobs, for which the chunks in question are computed once more.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, cycle
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from ruvon.engine.flight import Flight, StepFuture, alternatives, land, make_staging
from ruvon.engine.graphs import (
    Bucket,
    Captured,
    Graphs,
    Words,
    choose_bucket,
    clear,
    mixed_buckets,
    single_buckets,
)
from ruvon.engine.runner import Runner, Sampler, complete_rows
from ruvon.engine.seats import Seating, Seats
from ruvon.engine.seatwork import SeatWork
from ruvon.engine.types import UNDRAWN, Plan, SamplingRow, StepResult
from ruvon.kernels import sample
from ruvon.kernels.ops import ForwardBatch
from ruvon.kernels.pdl import supports_pdl
from ruvon.telemetry import Progress

SWITCH_INTERVAL = 0.0005  # seconds for which a thread may keep the interpreter to itself
STAGES = 3  # steps whose pinned memory is in use: two under way, one being prepared


def draws_on_host(row: SamplingRow) -> bool:
    return row.sampling.typical_p < 1 or bool(row.sampling.bad_words)


class Compilations:
    """Counts kernels that are compiled, or loaded from Triton's cache, from now on: each holds up
    the step that needs it."""

    def __init__(self) -> None:
        self.num = 0
        self._others = triton.knobs.runtime.jit_post_compile_hook
        triton.knobs.runtime.jit_post_compile_hook = self

    def __call__(self, **facts: Any) -> bool | None:
        """As Triton calls its hook."""
        self.num += 1
        return self._others(**facts) if self._others is not None else None

    def close(self) -> None:
        """Stop counting."""
        if triton.knobs.runtime.jit_post_compile_hook is self:
            triton.knobs.runtime.jit_post_compile_hook = self._others


class GpuRunner:
    """Implements the engine's `Runner` protocol."""

    depth = 2  # while one step computes, the host prepares the next
    long_step = sys.maxsize  # no step is so long that waiting for it would cost nothing

    def __init__(  # noqa: PLR0913, what a runner depends on
        self,
        forward: Callable[[ForwardBatch], Tensor],
        sampler: Sampler,
        scorer: Runner,
        *,
        device: torch.device,
        block_size: int,
        vocab_size: int,
        max_model_len: int,
        max_seqs: int,
        max_tokens: int,
        eos_token_ids: Sequence[int],
        progress: Progress,
    ) -> None:
        """``sampler`` draws what the device cannot, ``scorer`` runs chunks for their prompt
        logprobs alone; ``max_tokens`` bounds a step."""
        self._sampler = sampler
        self._scorer = scorer
        self._block_size = block_size
        self._singles = single_buckets(max_seqs)
        self._mixed = mixed_buckets(max_tokens, max_seqs)
        width = -(-max_model_len // block_size)
        state = sample.make_state(max_seqs, vocab_size, device)
        self._seats = Seats(max_seqs, width, block_size)
        self._work = SeatWork(state, eos_token_ids)
        self._graphs = Graphs(
            forward,
            state,
            table_width=width,
            max_context=max_model_len,
            buckets=self._singles + self._mixed,
            pdl=supports_pdl(device),
        )
        with torch.inference_mode():
            self._captured: dict[Bucket, Captured] = self._graphs.capture_all(progress)
        self._staging = cycle([make_staging(self._graphs, self._captured) for _ in range(STAGES)])
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="ruvon-step")
        # That thread must get to say that a step is over, however busy others are.
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL))
        self._aloft: deque[StepFuture] = deque()
        self._last: tuple[Plan, Future[StepResult]] | None = None
        self.num_misses = 0  # steps that a graph alone was not enough for
        self._compilations = Compilations()

    @property
    def num_compilations(self) -> int:
        """Kernels compiled or loaded since all graphs were captured."""
        return self._compilations.num

    @property
    def counters(self) -> dict[str, tuple[str, Callable[[], int]]]:
        """What a server tells of it: by name, help and value."""
        return {
            "graph_misses": ("Steps a captured graph was not enough for.", lambda: self.num_misses),
            "kernel_compilations": (
                "Kernels compiled or loaded since the start.", lambda: self.num_compilations,
            ),
        }  # fmt: skip

    def launch(self, plan: Plan) -> Future[StepResult]:
        """Begin a step. The future holds its result, or whatever went wrong."""
        bucket = choose_bucket(self._singles, self._mixed, plan.num_tokens, len(plan.chunks))
        assert bucket is not None, "no step is larger than the limits"
        with torch.inference_mode():
            flight = self._launch(plan, bucket)
            if plan.prompt_rows or any(draws_on_host(row) for _, row in flight.special):
                future = self._complete(flight)
            else:
                future = StepFuture(flight, self._waiter)
                self._aloft.append(future)
        self._last = (plan, future)
        return future

    def close(self) -> None:
        """Finish the steps under way and end the threads."""
        self._waiter.shutdown()
        self._compilations.close()
        self._scorer.close()

    # ---------------------------------------------------------------- on the device

    def _launch(self, plan: Plan, bucket: Bucket) -> Flight:
        began = time.perf_counter()
        if len(self._aloft) == STAGES - 1:
            self._aloft.popleft().land()  # its memory is next
        staging = next(self._staging)
        staging.wait()
        captured = self._captured[bucket]
        seating = self._seats.assign(plan.chunks, bucket.sequences)
        self._work.move(seating.moves)
        inputs = staging.inputs[bucket]
        clear(inputs)
        self._fill(plan, seating, bucket.single, inputs)
        size = captured.layout.size
        self._graphs.words[:size].copy_(staging.words[:size], non_blocking=True)
        captured.replay()
        staging.results.copy_(self._graphs.results, non_blocking=True)
        special = [(i, row) for i, row in enumerate(plan.rows) if not row.plain]
        tops = alternatives(special, captured.logits_LV)
        if staging.done is not None:
            staging.done.record()
        return Flight(plan, special, staging, began, tops, captured.logits_LV)

    def _fill(self, plan: Plan, seating: Seating, single: bool, inputs: dict[str, Words]) -> None:
        """Write a step's inputs; ``single``: every chunk has one token. Tokens lie in the order of
        seats, one sequence after another."""
        chunks = plan.chunks
        seats = np.array(seating.seats, dtype=np.int32)
        lengths = [1] * len(chunks) if single else [len(chunk.tokens) for chunk in chunks]
        queries = np.array(lengths, dtype=np.int32)
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
        inputs["context_lens"][seats] = starts + queries
        ends = inputs["query_starts"][1:]
        ends[seats] = queries
        np.cumsum(ends, out=ends)
        first = inputs["query_starts"][seats]
        self._fill_tokens(plan, seating, single, (seats, queries, starts, first), inputs)
        self._fill_patches(seating, inputs["patches"])
        samples = np.array([chunk.samples for chunk in chunks])
        num_rows, row_seats = len(plan.rows), seats[samples]
        inputs["logit_rows"][:num_rows] = (first + queries - 1)[samples]
        self._work.fill(
            inputs["params"][:num_rows],
            plan.rows,
            row_seats,
            inputs["context_lens"][row_seats],
            {seating.seats[i] for i in seating.newcomers},
        )

    def _fill_tokens(
        self,
        plan: Plan,
        seating: Seating,
        single: bool,
        layout: tuple[Words, Words, Words, Words],
        inputs: dict[str, Words],
    ) -> None:
        """``layout``: each chunk's seat, number of tokens, first position and first token."""
        seats, queries, starts, first = layout
        chunks = plan.chunks
        if single:
            owner, places = np.arange(len(chunks)), first
            ids = np.array([chunk.tokens[0] for chunk in chunks], dtype=np.int32)
        else:
            order = np.argsort(seats)
            owner = np.repeat(order, queries[order])  # a token's chunk
            places = np.arange(len(owner), dtype=np.int32)
            tokens = chain.from_iterable([chunks[i].tokens for i in order.tolist()])
            ids = np.array(list(tokens), dtype=np.int32)
        positions = places + (starts - first)[owner]
        undrawn = ids == UNDRAWN
        if undrawn.any():
            ids[undrawn] = -1 - sources(seating)[owner[undrawn]]
        blocks = self._seats.tables[seats[owner], positions // self._block_size]
        inputs["token_ids"][places] = ids
        inputs["positions"][places] = positions
        inputs["slots"][places] = blocks * self._block_size + positions % self._block_size

    def _fill_patches(self, seating: Seating, patches_N2: Words) -> None:
        num = len(seating.patches)
        if num <= len(patches_N2):
            patches_N2[:num] = np.array(seating.patches, dtype=np.int32).reshape(num, 2)
        else:  # many blocks out of the prefix cache: rare, and then a copy of all costs little
            self._graphs.tables.copy_(torch.from_numpy(self._seats.tables))

    # ---------------------------------------------------------------- on the host

    def _complete(self, flight: Flight) -> Future[StepResult]:
        """Wait for a step, and do what the device could not."""
        self.num_misses += 1
        drawn = self._last_drawn()  # before it is this step that is the last
        result = self._draw(flight, land(flight), drawn)
        future: Future[StepResult] = Future()
        future.set_result(self._score(flight.plan, result))
        return future

    def _score(self, plan: Plan, result: StepResult) -> StepResult:
        """The result with the prompt logprobs that are wanted."""
        launched = [self._scorer.launch(one) for one in for_scores(plan)]
        for scores in [future.result() for future in launched]:
            result = replace(
                result,
                prompt_logprobs={**result.prompt_logprobs, **scores.prompt_logprobs},
                errors={**scores.errors, **result.errors},
            )
        return result

    def _draw(self, flight: Flight, result: StepResult, drawn: Mapping[int, int]) -> StepResult:
        """The result with the host's own draws in place of the device's."""
        rows = complete_rows(flight.plan, drawn)
        places = [i for i, row in enumerate(rows) if draws_on_host(row)]
        if not places:
            return result
        own = self._sampler(flight.logits_LV[places], [rows[i] for i in places])
        tokens, logprobs, errors = list(result.tokens), list(result.logprobs), dict(result.errors)
        for i, token, score in zip(places, own.tokens, own.logprobs, strict=True):
            tokens[i], logprobs[i] = token, score
            errors.pop(rows[i].seq_id, None)
            if token:
                self._work.replace_last(self._seats.seat_of(rows[i].seq_id), token[0])
        return replace(
            result, tokens=tuple(tokens), logprobs=tuple(logprobs), errors={**errors, **own.errors}
        )

    def _last_drawn(self) -> dict[int, int]:
        """By sequence, what the step launched last has drawn."""
        if self._last is None:
            return {}
        plan, future = self._last
        drawn = zip(plan.rows, future.result().tokens, strict=True)
        return {row.seq_id: tokens[0] for row, tokens in drawn if tokens}


def sources(seating: Seating) -> Words:
    """For each chunk, where its sequence sat in the step before."""
    seats = np.array(seating.seats, dtype=np.int32)
    for old, new in seating.moves:
        seats[seats == new] = old
    return seats


def for_scores(plan: Plan) -> list[Plan]:
    """The chunks of a plan whose prompt logprobs are wanted, and nothing else of it. One at a time:
    kernels are compiled for numbers of sequences, and the host scores a row at a time anyway."""
    chunks = [replace(plan.chunks[row.chunk], samples=False) for row in plan.prompt_rows]
    rows = [replace(row, chunk=0) for row in plan.prompt_rows]
    return [Plan(plan.step, (chunk,), (), (row,)) for chunk, row in zip(chunks, rows, strict=True)]
