"""A step as one CUDA graph: captured for a few sizes at start, replayed with data in fixed places.

A step of any composition is padded to the next size, a `Bucket`. Everything it reads lies in one
device buffer of 32-bit words (`Layout`), filled by a single copy; everything it leaves (the drawn
tokens, the cache, the block tables) lies in buffers that outlive it. So a step can be launched
before the host has seen the tokens of the one before: an id of ``-1 - seat`` stands for what that
seat drew last.

Padding has no queries, no context and no slot, and so is not computed with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ruvon.engine.batch import padded
from ruvon.kernels import sample
from ruvon.kernels.begin import begin
from ruvon.kernels.ops import ForwardBatch
from ruvon.telemetry import Progress

Words: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]


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


def choose_bucket(
    singles: list[Bucket], mixed: list[Bucket], tokens: int, sequences: int
) -> Bucket | None:
    """The smallest that holds a step; all its sequences have one token if counts are equal."""
    candidates = singles if tokens == sequences else mixed
    fitting = (b for b in candidates if b.tokens >= tokens and b.sequences >= sequences)
    return next(fitting, None)


class Layout:
    """Where a bucket's inputs lie in the buffer of words, each on a boundary of 16 bytes."""

    def __init__(self, bucket: Bucket) -> None:
        tokens, sequences = bucket.tokens, bucket.sequences
        self.num_patches = tokens + sequences
        shapes = {
            "token_ids": (tokens,),
            "positions": (tokens,),
            "slots": (tokens,),
            "query_starts": (sequences + 1,),
            "context_lens": (sequences,),
            "logit_rows": (sequences,),
            "params": (sequences, sample.PARAMS),
            "patches": (self.num_patches, 2),
        }
        self._places: dict[str, tuple[int, int, tuple[int, ...]]] = {}
        self.size = 0
        for name, shape in shapes.items():
            num_words = math.prod(shape)
            self._places[name] = (self.size, self.size + num_words, shape)
            self.size += padded(num_words)

    def views(self, words: Any) -> dict[str, Any]:
        """The inputs by name, in a tensor or an array of at least ``size`` words."""
        return {
            name: words[first:end].reshape(shape)
            for name, (first, end, shape) in self._places.items()
        }


@dataclass(frozen=True, slots=True)
class Captured:
    """A bucket's step, ready to run."""

    layout: Layout
    replay: Callable[[], object]
    logits_LV: Tensor  # of the last replay; all buckets share the memory


class Graphs:
    """Captures steps of a model over its cache. On a CPU a step just runs: for tests."""

    def __init__(
        self,
        forward: Callable[[ForwardBatch], Tensor],
        state: sample.SamplingState,
        *,
        table_width: int,
        max_context: int,
        buckets: list[Bucket],
        pdl: bool,
    ) -> None:
        seats, device = state.last_tokens.shape[0], state.last_tokens.device
        self._forward = forward
        self._state = state
        self._max_context = max_context
        self._pdl = pdl
        self._layouts = {bucket: Layout(bucket) for bucket in buckets}
        self.num_words = max(layout.size for layout in self._layouts.values())
        self.words = torch.zeros(self.num_words, dtype=torch.int32, device=device)
        self.tables = torch.zeros(seats, table_width, dtype=torch.int32, device=device)
        self.results = torch.zeros(3, seats, dtype=torch.int32, device=device)
        self._ids = torch.zeros(max(b.tokens for b in buckets), dtype=torch.int32, device=device)

    def capture_all(self, progress: Progress) -> dict[Bucket, Captured]:
        """Largest first, so that all can use the memory of the first."""
        self._clear()
        pool = torch.cuda.graph_pool_handle() if self.words.is_cuda else None
        captured = {}
        for i, bucket in enumerate(sorted(self._layouts, key=lambda b: -b.tokens * b.sequences)):
            progress("capturing steps", i / len(self._layouts))
            captured[bucket] = self._capture(bucket, pool)
        return captured

    def _clear(self) -> None:
        """As padding: nothing to read, nothing to write."""
        for layout in self._layouts.values():
            clear(layout.views(self.words))

    def _capture(self, bucket: Bucket, pool: Any) -> Captured:
        layout = self._layouts[bucket]
        inputs = layout.views(self.words)
        clear(inputs)
        logits = self._step(bucket, inputs)  # compiles kernels, and lets cuBLAS make up its mind
        if not self.words.is_cuda:
            return Captured(layout, lambda: logits.copy_(self._step(bucket, inputs)), logits)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._step(bucket, inputs)
        return Captured(layout, graph.replay, borrow(logits))

    def _step(self, bucket: Bucket, inputs: dict[str, Tensor]) -> Tensor:
        ids = self._ids[: bucket.tokens]
        last_tokens = self._state.last_tokens
        begin(inputs["token_ids"], last_tokens, ids, inputs["patches"], self.tables, self._pdl)
        batch = ForwardBatch(
            token_ids=ids,
            positions=inputs["positions"],
            slots=inputs["slots"],
            block_tables=self.tables[: bucket.sequences],
            query_starts=inputs["query_starts"],
            context_lens=inputs["context_lens"],
            logit_rows=inputs["logit_rows"],
            max_query=1 if bucket.single else bucket.tokens,
            max_context=self._max_context,
        )
        logits_LV = self._forward(batch)
        tokens, logprobs, ranks = self.results
        drawn = sample.Drawn(tokens, logprobs.view(torch.float32), ranks)
        sample.sample(logits_LV, inputs["params"], self._state, drawn, self._pdl)
        return logits_LV


def borrow(tensor: Tensor) -> Tensor:
    """The same memory on the device, but no claim to it: the next capture may use it too."""
    place = SimpleNamespace(__cuda_array_interface__=tensor.__cuda_array_interface__)
    return torch.as_tensor(place, device=tensor.device)


def clear(inputs: dict[str, Any]) -> None:
    """Make all of a step's inputs, tensors or arrays, padding."""
    for name, values in inputs.items():
        values[...] = -1 if name in ("slots", "patches") else 0
    inputs["params"][:, sample.SEAT] = -1
