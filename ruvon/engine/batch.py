"""`Plan` to `ForwardBatch`: one step's work as the tensors a model reads.

In two parts, for a step may be planned while the one before it still samples: `lay_out`
does all that does not need those tokens, meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch

from ruvon.engine.types import BEING_SAMPLED, Chunk, Plan
from ruvon.kernels.ops import ForwardBatch

Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

NOTHING: Mapping[int, int] = MappingProxyType({})


class BlockTables(dict[int, list[int]]):
    """The block table of every sequence that a stream of plans has not ended."""

    def follow(self, plan: Plan) -> None:
        """Take in what a plan says; each has to be followed once, in order."""
        for seq_id in plan.ended:
            self.pop(seq_id, None)
        for new in plan.new:
            self[new.seq_id] = []
        for chunk in plan.chunks:
            if chunk.blocks:
                self[chunk.seq_id].extend(chunk.blocks)


@dataclass(slots=True)
class PendingBatch:
    """A `ForwardBatch` in the making: its arrays, and which tokens are missing."""

    token_ids: Ints
    positions: Ints
    slots: Ints
    block_tables: Ints
    query_starts: Ints
    context_lens: Ints
    logit_rows: Ints
    max_query: int
    max_context: int
    placeholders: list[tuple[int, int]]  # (place in token_ids, the sequence it belongs to)

    def to_batch(
        self, device: torch.device | None, sampled: Mapping[int, int] = NOTHING
    ) -> ForwardBatch:
        """On a device, or as the numpy arrays that they are here. ``sampled`` has, by sequence, the
        tokens that were being sampled when the plan was made; one that is not in there has failed,
        and anything may stand for it."""
        for place, seq_id in self.placeholders:
            self.token_ids[place] = sampled.get(seq_id, 0)
        arrays = (
            self.token_ids,
            self.positions,
            self.slots,
            self.block_tables,
            self.query_starts,
            self.context_lens,
            self.logit_rows,
        )
        tensors: Any = arrays if device is None else to_device(arrays, device)
        return ForwardBatch(
            token_ids=tensors[0],
            positions=tensors[1],
            slots=tensors[2],
            block_tables=tensors[3],
            query_starts=tensors[4],
            context_lens=tensors[5],
            logit_rows=tensors[6],
            max_query=self.max_query,
            max_context=self.max_context,
        )


def build_batch(plan: Plan, block_size: int, device: torch.device) -> ForwardBatch:
    """The batch for a plan that follows no other: it introduces all its sequences."""
    tables = BlockTables()
    tables.follow(plan)
    return lay_out(plan, tables, block_size).to_batch(device)


def lay_out(plan: Plan, tables: Mapping[int, list[int]], block_size: int) -> PendingBatch:
    """All of the batch for a plan of at least one chunk, but tokens that are being sampled.

    ``tables`` have followed the plan. ``logit_rows`` starts with the rows of ``plan.rows``, in
    order; those of ``plan.prompt_rows`` follow.
    """
    chunks = plan.chunks
    queries = [len(chunk.tokens) for chunk in chunks]
    contexts = [chunk.start + query for chunk, query in zip(chunks, queries, strict=True)]
    query_starts = ints([*accumulate(queries, initial=0)])
    token_ids = np.fromiter(
        chain.from_iterable([chunk.tokens for chunk in chunks]), np.int32, int(query_starts[-1])
    )
    block_tables = pad_tables(
        [tables[chunk.seq_id] for chunk in chunks],
        [-(-context // block_size) for context in contexts],
    )
    positions, slots = places(chunks, query_starts, block_tables, block_size)
    return PendingBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        block_tables=block_tables,
        query_starts=query_starts,
        context_lens=ints(contexts),
        logit_rows=logit_rows(plan, query_starts),
        max_query=max(queries),
        max_context=max(contexts),
        placeholders=[
            (int(place), chunk.seq_id)
            for place, chunk in zip(query_starts, chunks, strict=False)
            if chunk.tokens == BEING_SAMPLED
        ],
    )


def places(
    chunks: Sequence[Chunk], query_starts: Ints, tables: Ints, block_size: int
) -> tuple[Ints, Ints]:
    """Each token's position in its sequence and its slot in the cache."""
    total, starts = int(query_starts[-1]), ints([chunk.start for chunk in chunks])
    if total == len(chunks):  # decodes only: one token each
        owner, positions = np.arange(total), starts
    else:
        owner = np.repeat(np.arange(len(chunks)), np.diff(query_starts))
        positions = np.arange(total, dtype=np.int32) + (starts - query_starts[:-1])[owner]
    return positions, tables[owner, positions // block_size] * block_size + positions % block_size


def ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int32)


def pad_tables(tables: Sequence[list[int]], num_needed: Sequence[int]) -> Ints:
    """One row a sequence, as wide as the longest, padded with 0."""
    padded = np.zeros((len(tables), max(num_needed)), dtype=np.int32)
    for row, table, needed in zip(padded, tables, num_needed, strict=True):
        row[:needed] = table[:needed]
    return padded


def logit_rows(plan: Plan, query_starts: Ints) -> Ints:
    if all(chunk.samples for chunk in plan.chunks):
        last = query_starts[1:] - 1
    else:
        last = query_starts[1:][np.array([chunk.samples for chunk in plan.chunks])] - 1
    if not plan.prompt_rows:
        return last
    scored = [
        query_starts[row.chunk] + np.arange(len(row.targets), dtype=np.int32)
        for row in plan.prompt_rows
    ]
    return np.concatenate((last, *scored))


def to_device(arrays: tuple[Ints, ...], device: torch.device) -> list[torch.Tensor]:
    """As tensors; for another device in a single copy, which costs as much as each would."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    joined = torch.from_numpy(join(arrays)).pin_memory().to(device, non_blocking=True)
    return part(joined, [array.shape for array in arrays])


def join(arrays: Sequence[Ints]) -> Ints:
    """One after another, each on a boundary of 16 bytes: kernels are compiled anew for others."""
    words = np.zeros(sum(padded(array.size) for array in arrays), dtype=np.int32)
    start = 0
    for array in arrays:
        words[start : start + array.size] = array.ravel()
        start += padded(array.size)
    return words


def part(joined: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """What was joined, given its shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    pieces = torch.split(joined, [padded(size) for size in sizes])
    parts = zip(pieces, sizes, shapes, strict=True)
    return [piece[:size].view(shape) for piece, size, shape in parts]


def padded(size: int) -> int:
    """Words up to the next boundary of 16 bytes."""
    return -(-size // 4) * 4
