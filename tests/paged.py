"""Runs a model over a paged cache by hand: what the engine does, without the engine."""

from __future__ import annotations

import random

import torch

from ruvon.kernels.ops import ForwardBatch, PagedIndex
from ruvon.models import Model
from ruvon.models.cache_groups import cache_groups

BLOCK = 4


class PagedSequences:
    """Some sequences on their way through a model, their blocks scattered over the cache."""

    def __init__(self, model: Model, capacity: int = 512, block: int = BLOCK) -> None:
        spec = model.spec
        self.model, self.block = model, block
        shape = (capacity // block, spec.num_kv_heads, block, spec.head_dim)
        self.cache = [
            (torch.full(shape, torch.nan), torch.full(shape, torch.nan)) for _ in model.held
        ]
        self.free = list(range(shape[0]))
        random.Random(0).shuffle(self.free)
        self.blocks: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def step(self, chunks: dict[int, list[int]], every_row: bool = True) -> torch.Tensor:
        """Feeds each sequence (by number) its next tokens; logits of all rows, or the last ones."""
        batch = self.batch(chunks, every_row)
        with torch.inference_mode():
            return self.model.forward(batch, self.cache)

    def batch(self, chunks: dict[int, list[int]], every_row: bool) -> ForwardBatch:
        ids, positions, slots, starts, contexts = [], [], [], [0], []
        for number, tokens in chunks.items():
            places = self._grow(number, len(tokens))
            ids += tokens
            positions += places
            table = self.blocks[number]
            slots += [table[at // self.block] * self.block + at % self.block for at in places]
            starts.append(len(ids))
            contexts.append(self.lengths[number])
        longest = max(len(self.blocks[number]) for number in chunks)
        tables = [self.blocks[n] + [0] * (longest - len(self.blocks[n])) for n in chunks]
        rows = range(len(ids)) if every_row else [start - 1 for start in starts[1:]]
        return ForwardBatch(
            token_ids=ints(ids),
            positions=ints(positions),
            paged=(PagedIndex(ints(slots), ints(tables)),) * len(cache_groups(self.model.spec)),
            query_starts=ints(starts),
            context_lens=ints(contexts),
            logit_rows=ints(rows),
            max_query=max(len(tokens) for tokens in chunks.values()),
            max_context=max(contexts),
        )

    def _grow(self, number: int, count: int) -> range:
        start = self.lengths.get(number, 0)
        self.lengths[number] = start + count
        table = self.blocks.setdefault(number, [])
        while len(table) * self.block < start + count:
            table.append(self.free.pop())
        return range(start, start + count)


def ints(values: object) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)
