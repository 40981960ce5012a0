"""A step as one CUDA graph: captured for a few sizes at start, replayed with data in fixed places.

A step of any composition is padded to the next size, a `Bucket`. Everything it reads lies in one
device buffer of 32-bit words (`StepWords`), which its first kernel loads out of the host's memory
(a `StagingBuffer`); everything it leaves (the cache, the block tables, the sampled tokens, which
its last kernel stores in the same staging buffer) lies in buffers that outlive it. So a step can be
launched before the host has seen the tokens of the one before: an id of ``-1 - slot`` stands for
what that slot of the persistent batch sampled last.

Rows with a mask are left out by the step, for the host computes their masks meanwhile: a second
small graph samples them, once these are there.

Padding has no queries, no context and no slot, and so is not computed with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ruvon.engine.batch import Ints, padded
from ruvon.kernels import sample
from ruvon.kernels.ops import ForwardBatch, PagedIndex
from ruvon.kernels.staging import load_inputs, load_masks, store_outputs
from ruvon.telemetry import Progress

NUM_STAGING = 3  # buffers: two steps are in flight, and one is being prepared


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A size of step. Where ``single``, every sequence has one token at most."""

    single: bool
    tokens: int
    sequences: int


def single_buckets(max_seqs: int) -> list[Bucket]:
    """1, 2, 4, then multiples of 8, which is what the products are computed in anyway."""
    sizes = [n for n in (1, 2, 4) if n < max_seqs] + list(range(8, max_seqs, 8)) + [max_seqs]
    return [Bucket(True, n, n) for n in sizes]


def mixed_buckets(max_tokens: int, max_seqs: int) -> list[Bucket]:
    """Powers of two, each for few sequences and for as many as may run."""
    sizes = [n for n in (1 << i for i in range(4, 30)) if n < max_tokens] + [max_tokens]
    few = min(16, max_seqs)
    return [
        Bucket(False, tokens, sequences)
        for tokens in sizes
        for sequences in sorted({few, max_seqs})
    ]


class StepWords:
    """Where a bucket's inputs lie in the buffer of words, each on a boundary of 16 bytes."""

    def __init__(self, bucket: Bucket, num_groups: int = 1) -> None:
        """``num_groups``: cache groups, each of which has slots and new blocks of its own."""
        tokens, sequences = bucket.tokens, bucket.sequences
        shapes = {
            "token_ids": (tokens,),
            "positions": (tokens,),
            "slots": (num_groups, padded(tokens)),
            "query_starts": (sequences + 1,),
            "context_lens": (sequences,),
            "logit_rows": (sequences,),
            "params": (sequences, sample.PARAMS),
            "mode": (1,),
            "new_blocks": (num_groups, sequences if bucket.single else 0),
            "patches": (tokens + num_groups * sequences, 2),
        }
        self._spans: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self.size = 0
        for name, shape in shapes.items():
            num_words = math.prod(shape)
            self._spans[name] = (self.size, self.size + num_words, shape)
            self.size += padded(num_words)
        self.blank: Ints = np.zeros(self.size, dtype=np.int32)  # padding and nothing else
        inputs = self.views(self.blank)
        for values in (inputs["slots"], inputs["patches"], inputs["params"][:, sample.SLOT]):
            values[...] = -1

    def views(self, words: Any) -> dict[str, Any]:
        """The inputs by name, in a tensor or an array of at least ``size`` words."""
        return {
            name: words[first:end].reshape(shape)
            for name, (first, end, shape) in self._spans.items()
        }


@dataclass(frozen=True, slots=True)
class StagingBuffer:
    """Memory of the host's that one step reads its inputs from and stores its results in."""

    words: Ints
    inputs: dict[Bucket, dict[str, Ints]]  # the words as each bucket's inputs
    results: Tensor  # int32 [3, rows]: tokens, log-probabilities (float32 by their bits), ranks
    done: Any  # torch.cuda.Event, to be recorded after the step; None on a CPU, where it is over


@dataclass(frozen=True, slots=True)
class Captured:
    """A bucket's step, ready to run."""

    replay: Callable[[], object]
    sample_masked: Callable[[], object]  # the rows of the last replay that have a mask
    logits_LV: Tensor  # of the last replay; all buckets share the memory
    params_LP: Tensor  # int32, of the same
    graphs: Graphs  # which holds the memory that a replay works in


class Graphs:
    """Captures steps of a model over its cache. On a CPU a step just runs: for tests."""

    def __init__(  # noqa: PLR0913, what a graph depends on
        self,
        forward: Callable[[ForwardBatch], Tensor],
        state: sample.SamplingState,
        *,
        table_width: int,
        block_size: int,
        num_groups: int = 1,
        max_context: int,
        buckets: list[Bucket],
        pdl: bool,
        samples: bool = True,
    ) -> None:
        """``num_groups``: cache groups, each of which has a table for each slot. Where it does not
        sample it is a stage before the last, whose ``forward`` sends on what it makes."""
        slots, device = state.last_tokens.shape[0], state.last_tokens.device
        self._forward = forward
        self._state = state
        self._block_size = block_size
        self._max_context = max_context
        self._pdl = pdl
        self._samples = samples
        self.layouts = {bucket: StepWords(bucket, num_groups) for bucket in buckets}
        num_words = max(layout.size for layout in self.layouts.values())
        zeros = partial(torch.zeros, dtype=torch.int32)
        self._words = zeros(num_words, device=device)
        self.tables = zeros(num_groups, slots, padded(table_width), device=device)
        self._results = zeros(3, slots, device=device)
        self._turn = zeros(1, device=device)
        self._staged_inputs = zeros(NUM_STAGING, num_words, pin_memory=device.type == "cuda")
        self._staged_results = zeros(NUM_STAGING, 3, slots, pin_memory=device.type == "cuda")
        # One buffer is enough: masks are computed when the step before is over.
        self.staged_masks = zeros(*state.masks.shape, pin_memory=device.type == "cuda")

    def capture_all(self, progress: Progress) -> dict[Bucket, Captured]:
        """Largest first, so that all can use the memory of the first."""
        pool = torch.cuda.graph_pool_handle() if self._words.is_cuda else None
        captured = {}
        for i, bucket in enumerate(sorted(self.layouts, key=lambda b: -b.tokens * b.sequences)):
            progress("capturing steps", i / len(self.layouts))
            captured[bucket] = self._capture(bucket, pool)
        self._turn.zero_()
        return captured

    def staging(self) -> list[StagingBuffer]:
        """In the order in which steps use them, over and over, from the first step on."""
        cuda, buffers = self._words.is_cuda, []
        for inputs, results in zip(self._staged_inputs, self._staged_results, strict=True):
            words = inputs.numpy()
            views = {bucket: layout.views(words) for bucket, layout in self.layouts.items()}
            done = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
            buffers.append(StagingBuffer(words, views, results, done))
        return buffers

    def _capture(self, bucket: Bucket, pool: Any) -> Captured:
        layout = self.layouts[bucket]
        self._staged_inputs[:, : layout.size] = torch.from_numpy(layout.blank)
        logits = self._step(bucket)  # compiles kernels, and lets cuBLAS make up its mind
        masked = partial(self.sample, bucket, masked=True)
        masked(logits)
        params = layout.views(self._words)["params"]
        if not self._words.is_cuda:
            replay = torch.inference_mode()(lambda: logits.copy_(self._step(bucket)))
            return Captured(replay, partial(masked, logits), logits, params, self)
        torch.cuda.synchronize()
        step, rest = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(step, pool=pool):
            logits = self._step(bucket)
        with torch.cuda.graph(rest, pool=pool):
            masked(logits)
        return Captured(step.replay, rest.replay, borrow(logits), params, self)

    def _step(self, bucket: Bucket) -> Tensor:
        """Its logits; a stage that does not sample has none, and anything stands for them."""
        logits_LV = self.forward(bucket)
        if not self._samples:
            logits_LV = self._results
        self.sample(bucket, logits_LV)
        return logits_LV

    def forward(self, bucket: Bucket) -> Tensor:
        """The first part of a step, from staged inputs to logits."""
        layout = self.layouts[bucket]
        inputs = layout.views(self._words)
        load_inputs(
            self._staged_inputs,
            self._turn,
            self._words[: layout.size],
            inputs,
            self._state.last_tokens,
            self.tables,
            self._block_size,
            self._pdl,
        )
        paged = [
            PagedIndex(slots[: bucket.tokens], tables[: bucket.sequences])
            for slots, tables in zip(inputs["slots"], self.tables, strict=True)
        ]
        return self._forward(
            ForwardBatch(
                token_ids=inputs["token_ids"],
                positions=inputs["positions"],
                paged=tuple(paged),
                query_starts=inputs["query_starts"],
                context_lens=inputs["context_lens"],
                logit_rows=inputs["logit_rows"],
                max_query=1 if bucket.single else bucket.tokens,
                max_context=self._max_context,
            )
        )

    def sample(self, bucket: Bucket, logits_LV: Tensor, *, masked: bool = False) -> None:
        """The second part, from logits to staged results; or, after it, the same for rows with a
        mask. It needs the first one's inputs and nothing else."""
        params = self.layouts[bucket].views(self._words)["params"]
        tokens, logprobs, ranks = self._results
        sampled = sample.Sampled(tokens, logprobs.view(torch.float32), ranks)
        if masked and self._samples:
            load_masks(self.staged_masks, self._state.masks, params, self._pdl)
        if self._samples:
            sample.sample(logits_LV, params, self._state, sampled, self._pdl, masked=masked)
        store_outputs(self._results, self._staged_results, self._turn, self._pdl, again=masked)


def borrow(tensor: Tensor) -> Tensor:
    """The same memory on the device, but no claim to it: the next capture may use it too."""
    place = SimpleNamespace(__cuda_array_interface__=tensor.__cuda_array_interface__)
    return torch.as_tensor(place, device=tensor.device)
