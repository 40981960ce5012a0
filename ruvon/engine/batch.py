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

from ruvon.engine.blocks import first_block
from ruvon.engine.types import BEING_SAMPLED, Chunk, Plan, SamplingRow
from ruvon.kernels.ops import ForwardBatch, PagedIndex

Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

Windows: TypeAlias = tuple[int, ...]
"""How many tokens each cache group sees; 0 is all of them."""

NOTHING: Mapping[int, SamplingRow] = MappingProxyType({})


class BlockTables(dict[int, tuple[list[int], ...]]):
    """The block tables, one a cache group, of every sequence that a stream of plans has not ended.

    Blocks that have left a group's window stay in its table here, and belong to others by then:
    nobody is to look at them.
    """

    def follow(self, plan: Plan) -> None:
        """Take in what a plan says; each has to be followed once, in order."""
        for seq_id in plan.ended:
            self.pop(seq_id, None)
        for new in plan.new:
            self[new.seq_id] = ()
        for chunk in plan.chunks:
            if chunk.blocks:
                self.extend(chunk)

    def extend(self, chunk: Chunk) -> None:
        """Take in the blocks of a chunk that has some, as the first of every sequence has."""
        tables = self[chunk.seq_id]
        if not tables:
            self[chunk.seq_id] = tuple([[*blocks] for blocks in chunk.blocks])
            return
        for table, blocks in zip(tables, chunk.blocks, strict=True):
            table += blocks


@dataclass(slots=True)
class PendingBatch:
    """A `ForwardBatch` in the making: its arrays, and which tokens are missing."""

    token_ids: Ints
    positions: Ints
    query_starts: Ints
    context_lens: Ints
    logit_rows: Ints
    paged: list[tuple[Ints, Ints]]  # slots and block tables of each cache group
    max_query: int
    max_context: int
    placeholders: list[tuple[int, int]]  # (place in token_ids, the sequence it belongs to)

    def to_batch(
        self, device: torch.device | None, rows: Mapping[int, SamplingRow] = NOTHING
    ) -> ForwardBatch:
        """On a device, or as the numpy arrays that they are here. ``rows`` have, by sequence, the
        tokens that were being sampled when the plan was made; if that has failed, anything may
        stand for one."""
        for place, seq_id in self.placeholders:
            self.token_ids[place] = rows[seq_id].history[-1]
        arrays = (
            self.token_ids,
            self.positions,
            self.query_starts,
            self.context_lens,
            self.logit_rows,
            *chain.from_iterable(self.paged),
        )
        tensors: Any = arrays if device is None else to_device(arrays, device)
        return ForwardBatch(
            token_ids=tensors[0],
            positions=tensors[1],
            paged=tuple(
                [PagedIndex(*each) for each in zip(tensors[5::2], tensors[6::2], strict=True)]
            ),
            query_starts=tensors[2],
            context_lens=tensors[3],
            logit_rows=tensors[4],
            max_query=self.max_query,
            max_context=self.max_context,
        )


def build_batch(
    plan: Plan, block_size: int, device: torch.device, windows: Windows = (0,)
) -> ForwardBatch:
    """The batch for a plan that follows no other: it introduces all its sequences."""
    tables = BlockTables()
    tables.follow(plan)
    return lay_out(plan, tables, block_size, windows).to_batch(device)


def lay_out(
    plan: Plan,
    tables: Mapping[int, Sequence[list[int]]],
    block_size: int,
    windows: Windows = (0,),
) -> PendingBatch:
    """All of the batch for a plan of at least one chunk, but tokens that are being sampled.

    ``tables`` have followed the plan; ``windows`` are those of the cache groups. ``logit_rows``
    starts with the rows of ``plan.rows``, in order; those of ``plan.prompt_rows`` follow.
    """
    chunks = plan.chunks
    queries = [len(chunk.tokens) for chunk in chunks]
    contexts = [chunk.start + query for chunk, query in zip(chunks, queries, strict=True)]
    query_starts = ints([*accumulate(queries, initial=0)])
    token_ids = np.fromiter(
        chain.from_iterable([chunk.tokens for chunk in chunks]), np.int32, int(query_starts[-1])
    )
    owner, positions = places(chunks, query_starts)
    paged = []
    for group, window in enumerate(windows):
        block_tables = pad_tables(
            [tables[chunk.seq_id][group] for chunk in chunks],
            [first_block(chunk.start, window, block_size) for chunk in chunks] if window else None,
            [-(-context // block_size) for context in contexts],
        )
        paged.append((slots_of(owner, positions, block_tables, block_size), block_tables))
    return PendingBatch(
        token_ids=token_ids,
        positions=positions,
        query_starts=query_starts,
        context_lens=ints(contexts),
        logit_rows=logit_rows(plan, query_starts),
        paged=paged,
        max_query=max(queries),
        max_context=max(contexts),
        placeholders=[
            (int(place), chunk.seq_id)
            for place, chunk in zip(query_starts, chunks, strict=False)
            if chunk.tokens == BEING_SAMPLED
        ],
    )


def places(chunks: Sequence[Chunk], query_starts: Ints) -> tuple[np.ndarray[Any, Any], Ints]:
    """Each token's chunk and its position in its sequence."""
    total, starts = int(query_starts[-1]), ints([chunk.start for chunk in chunks])
    if total == len(chunks):  # decodes only: one token each
        owner, positions = np.arange(total), starts
    else:
        owner = np.repeat(np.arange(len(chunks)), np.diff(query_starts))
        positions = np.arange(total, dtype=np.int32) + (starts - query_starts[:-1])[owner]
    return owner, positions


def slots_of(owner: np.ndarray[Any, Any], positions: Ints, tables: Ints, block_size: int) -> Ints:
    """Each token's slot in the cache."""
    slots: Ints = tables[owner, positions // block_size] * block_size + positions % block_size
    return slots


def ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int32)


def pad_tables(
    tables: Sequence[list[int]], firsts: Sequence[int] | None, ends: Sequence[int]
) -> Ints:
    """One row a sequence, as wide as the longest, with 0 before its first block that is looked at
    and behind its last."""
    padded = np.zeros((len(tables), max(ends)), dtype=np.int32)
    if firsts is None:
        for row, table, end in zip(padded, tables, ends, strict=True):
            row[:end] = table[:end]
        return padded
    for row, table, first, end in zip(padded, tables, firsts, ends, strict=True):
        row[first:end] = table[first:end]
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
