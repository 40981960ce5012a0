"""GpuRunner: steps as graph replays, launched without waiting for the step before.

`launch` writes a plan's words where the device finds them and replays a graph, which takes the host
a fraction of a millisecond. Whoever asks for the result waits for the device and reads it back; a
thread waits only for those who want to be called. Where a chunk has a placeholder for a token, the
device fills in what the sequence's slot sampled last.

What no graph does is launched behind it, and computed on the device as well: prompt logprobs.

Rows with a grammar, bad words or typical_p wait for their masks, for which the tokens of the step
before have to be known. So whoever reads a step back ends the next one, which computes logits
meanwhile: it checks the tokens, fills the masks, sends them and launches the rest.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ruvon.engine.batch import Ints, Windows
from ruvon.engine.gpu.graphs import (
    NUM_STAGING,
    Bucket,
    Captured,
    Graphs,
    mixed_buckets,
    single_buckets,
)
from ruvon.engine.gpu.in_flight import InFlightStep
from ruvon.engine.gpu.inputs import StepInputs
from ruvon.engine.gpu.persistent_batch import PersistentBatch
from ruvon.engine.gpu.sampling_state import SlotStates, part
from ruvon.engine.gpu.scoring import Scorer, Top, alternatives
from ruvon.engine.gpu.typical import is_typical, narrow_masks
from ruvon.engine.matching import Masks, Matchers, ban
from ruvon.engine.transforms import completing_ids
from ruvon.engine.types import Plan, SamplingRow, StepResult
from ruvon.kernels import sample
from ruvon.kernels.ops import ForwardBatch
from ruvon.kernels.pdl import supports_pdl
from ruvon.kernels.variants import count_variants
from ruvon.telemetry import Progress

PATIENCE = 0.002  # seconds that a caller may be held up for masks


class GpuRunner:
    """Implements the engine's `Runner` protocol."""

    depth = 2  # while one step computes, the host prepares the next
    long_step = sys.maxsize  # no step is so long that waiting for it would cost nothing

    def __init__(  # noqa: PLR0913, what a runner depends on
        self,
        forward: Callable[[ForwardBatch], Tensor],
        scorer: Scorer,
        *,
        device: torch.device,
        block_size: int,
        windows: Windows = (0,),
        vocab_size: int,
        max_model_len: int,
        max_seqs: int,
        max_tokens: int,
        eos_token_ids: Sequence[int],
        matchers: Matchers | None,
        progress: Progress,
    ) -> None:
        """``windows`` are those of the model's cache groups, ``max_tokens`` bounds a step;
        ``matchers`` see to rows with a grammar, a forced token in each step. Without any it is a
        stage before the last: steps are sent on, and no row has tokens."""
        self._scorer = scorer
        self._matchers = matchers
        singles = single_buckets(max_seqs)
        self._singles = [next(b for b in singles if b.tokens >= n) for n in range(max_seqs + 1)]
        self._mixed = mixed_buckets(max_tokens, max_seqs)
        self._state = sample.make_state(max_seqs, vocab_size, device)
        self._graphs = Graphs(
            forward,
            self._state,
            table_width=-(-max_model_len // block_size),
            block_size=block_size,
            num_groups=len(windows),
            max_context=max_model_len,
            buckets=singles + self._mixed,
            pdl=supports_pdl(device),
            samples=matchers is not None,
        )
        with torch.inference_mode():
            self._captured = self._graphs.capture_all(progress)
        self._staging = deque(self._graphs.staging())  # the next one first
        self._masks_RW = self._graphs.staged_masks.numpy()
        table_width = self._graphs.tables.shape[2]
        self._batch = PersistentBatch(max_seqs, table_width, block_size, windows)
        self._states = SlotStates(self._state, eos_token_ids)
        self._inputs = StepInputs(self._batch, self._states, self._graphs, block_size)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="ruvon-step")
        self._in_flight: deque[InFlightStep] = deque()
        self.start_counting()

    def start_counting(self) -> None:
        """From here on it is worth telling what is compiled, and what no graph is enough for."""
        self.num_misses = 0  # steps that a graph alone was not enough for
        self._num_variants = count_variants()

    @property
    def counters(self) -> dict[str, tuple[str, Callable[[], int]]]:
        """What a server tells of it: by name, help and value."""
        return {
            "graph_misses": ("Steps a captured graph was not enough for.", lambda: self.num_misses),
            "kernel_compilations": (  # each held up a step
                "Kernels compiled or loaded since the start.",
                lambda: count_variants() - self._num_variants,
            ),
        }  # fmt: skip

    @property
    def grammar_depth(self) -> int:
        """As ``depth``, unless masks take their time: then nobody waits for them to launch more."""
        latest = self._in_flight[-1].masks if self._in_flight else None
        return self.depth - (latest is not None and not latest.are_there(PATIENCE))

    def launch(self, plan: Plan) -> Future[StepResult]:
        """Begin a step. The future holds its result, or whatever went wrong."""
        began = time.perf_counter()
        if len(self._in_flight) == NUM_STAGING - 1:
            self._in_flight.popleft().read_back()  # its staging buffer is next
        latest = self._in_flight[-1] if self._in_flight else None
        if latest is not None and latest.masks is not None:
            latest.masks.are_there()
        staging = self._staging[0]
        bucket = self._choose_bucket(plan.num_tokens, len(plan.chunks))
        self._inputs.write(plan, bucket, staging)
        captured = self._captured[bucket]
        if self._matchers is not None:
            self._matchers.follow(plan)
        captured.replay()
        self._staging.rotate(-1)  # as the device does, even if something else fails here
        with torch.inference_mode():
            scores = self._scorer.score(plan, self._batch.tables)
            sums = self._scorer.pool(plan, self._batch.tables)
        step = InFlightStep(plan, staging, began, scores, sums, self._take, self._waiter)
        rows: dict[int, SamplingRow] = {}
        if self._matchers is not None:
            step.tops = self._alternatives(plan, captured.logits_LV)
            rows = part(self._states.masked, plan.rows)
        self._in_flight.append(step)
        self.num_misses += bool(scores or sums or any(map(is_typical, rows.values())))
        if not rows:
            step.end(self._stream)
            return step
        places = [i for i, row in rows.items() if row.sampling.grammar is not None]
        step.masks = masks = Masks(places, self._masks_RW[: len(rows)], Future())
        end = partial(self._end_masked, step, masks, captured, rows)
        if latest is None or latest.was_read.done():
            self._waiter.submit(end)
        else:
            latest.call_when_read(end)
        return step

    def _end_masked(
        self, step: InFlightStep, masks: Masks, captured: Captured, rows: Mapping[int, SamplingRow]
    ) -> None:
        """Fill the masks of a step whose predecessor has been read, and launch its end."""
        try:
            errors = self._fill([*rows.values()], masks.masks_RW)
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                staged_RW = self._graphs.staged_masks
                narrow_masks(rows, staged_RW, captured.logits_LV, captured.params_LP, self._state)
                captured.sample_masked()
                step.end(self._stream)
        except BaseException as error:  # the step's, not that of who has read the one before
            masks.filling.set_exception(error)
        else:
            masks.filling.set_result(errors)

    def _fill(self, rows: Sequence[SamplingRow], masks_RW: Ints) -> dict[int, str]:
        """Errors by sequence; if it was not foreseen, it is that of all who have a grammar."""
        assert self._matchers is not None
        try:
            errors = self._matchers.fill(rows, masks_RW)
        except BaseException as error:  # a panic of the library's is no Exception
            masks_RW[:] = -1
            reason = f"its mask could not be computed ({type(error).__name__})"
            errors = {row.seq_id: reason for row in rows if row.sampling.grammar is not None}
        for row, mask_W in zip(rows, masks_RW, strict=True):
            if row.sampling.bad_words:
                ban(mask_W, completing_ids(row))
        return errors

    def _take(self, step: InFlightStep, result: StepResult) -> StepResult:
        """Check what a step has sampled, and take note of it."""
        if self._matchers is None:
            return replace(result, tokens=((),) * len(step.plan.rows))
        if step.masks is not None:
            result = self._matchers.accept(step.plan.rows, step.masks, result)
        self._states.rows.record(step.plan, result.tokens)
        return result

    def close(self) -> None:
        """Finish the steps in flight and end the threads."""
        self._waiter.shutdown()
        if self._matchers is not None:
            self._matchers.close()

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

    def _alternatives(self, plan: Plan, logits_LV: Tensor) -> dict[int, Top]:
        """For rows that want logprobs, the likeliest tokens."""
        wanted = {
            place: row.sampling.logprob_token_ids or row.sampling.logprobs or 0
            for place, row in part(self._states.scored, plan.rows).items()
        }
        return alternatives(logits_LV[: len(plan.rows)], wanted) if wanted else {}
