"""GpuRunner: steps as graph replays, launched without waiting for the step before.

`launch` writes a plan's words where the device finds them and replays a graph, which takes the host
a fraction of a millisecond. Whoever asks for the result waits for the device and takes the tokens
down; a thread waits only for those who want to be called. Where a chunk has `UNDRAWN` for a token,
the device fills in what the sequence's seat drew last.

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
from itertools import cycle
from typing import Any

import torch
import triton
from torch import Tensor

from ruvon.engine.gpu.flight import Flight, StepFuture, alternatives, land
from ruvon.engine.gpu.graphs import (
    BOXES,
    Bucket,
    Captured,
    Graphs,
    mixed_buckets,
    single_buckets,
)
from ruvon.engine.gpu.inputs import StepInputs
from ruvon.engine.gpu.seats import Seats
from ruvon.engine.gpu.seatwork import SeatWork
from ruvon.engine.runner import Runner, Sampler, complete_rows
from ruvon.engine.types import Plan, SamplingRow, StepResult
from ruvon.kernels import sample
from ruvon.kernels.ops import ForwardBatch
from ruvon.kernels.pdl import supports_pdl
from ruvon.telemetry import Progress

SWITCH_INTERVAL = 0.0005  # seconds for which a thread may keep the interpreter to itself


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
        singles = single_buckets(max_seqs)
        self._singles = [next(b for b in singles if b.tokens >= n) for n in range(max_seqs + 1)]
        self._mixed = mixed_buckets(max_tokens, max_seqs)
        width = -(-max_model_len // block_size)
        state = sample.make_state(max_seqs, vocab_size, device)
        self._seats = Seats(max_seqs, width, block_size)
        self._work = SeatWork(state, eos_token_ids)
        graphs = Graphs(
            forward,
            state,
            table_width=width,
            max_context=max_model_len,
            buckets=singles + self._mixed,
            pdl=supports_pdl(device),
        )
        with torch.inference_mode():
            self._captured: dict[Bucket, Captured] = graphs.capture_all(progress)
        self._boxes = cycle(graphs.boxes())
        self._inputs = StepInputs(self._seats, self._work, graphs)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
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
        flight = self._launch(plan, self._choose_bucket(plan.num_tokens, len(plan.chunks)))
        future: Future[StepResult]
        if plan.prompt_rows or any(draws_on_host(row) for _, row in flight.special):
            with torch.inference_mode():
                future = self._complete(flight)
        else:
            future = StepFuture(flight, self._waiter)
            self._aloft.append(future)
        self._last = (plan, future)
        return future

    def _choose_bucket(self, tokens: int, sequences: int) -> Bucket:
        """The smallest that holds a step; if counts are equal, each sequence has one token."""
        if tokens == sequences:
            return self._singles[sequences]
        return next(b for b in self._mixed if b.tokens >= tokens and b.sequences >= sequences)

    @property
    def lost(self) -> bool:
        """Whether the device's context is, as after a wild access: everything raises from then
        on."""
        try:
            if self._stream is not None:
                self._stream.synchronize()
        except RuntimeError:
            return True
        return False

    def close(self) -> None:
        """Finish the steps under way and end the threads."""
        self._waiter.shutdown()
        self._compilations.close()
        self._scorer.close()

    # ---------------------------------------------------------------- on the device

    def _launch(self, plan: Plan, bucket: Bucket) -> Flight:
        began = time.perf_counter()
        if len(self._aloft) == BOXES - 1:
            self._aloft.popleft().land()  # its box is next
        box = next(self._boxes)
        captured = self._captured[bucket]
        self._inputs.write(plan, bucket, box)
        captured.replay()
        special = [(i, row) for i, row in enumerate(plan.rows) if not row.plain]
        tops = alternatives(special, captured.logits_LV) if special else {}
        if box.done is not None:
            box.done.record(self._stream)
        return Flight(plan, special, box, began, tops, captured.logits_LV)

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


def for_scores(plan: Plan) -> list[Plan]:
    """The chunks of a plan whose prompt logprobs are wanted, and nothing else of it. One at a time:
    kernels are compiled for numbers of sequences, and the host scores a row at a time anyway."""
    chunks = [replace(plan.chunks[row.chunk], samples=False) for row in plan.prompt_rows]
    rows = [replace(row, chunk=0) for row in plan.prompt_rows]
    return [Plan(plan.step, (chunk,), (), (row,)) for chunk, row in zip(chunks, rows, strict=True)]
