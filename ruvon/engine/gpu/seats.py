"""Seats: which row of the device's tables each sequence of a step has, and what changes in them.

Block tables live on the device and change little from step to step, so a step sends only changes.
A sequence keeps its seat as long as every step has a chunk of it; whoever misses a step loses it,
for everything a seat holds can be made anew. Seats are kept low, because a step's cost on the
device depends on the highest.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ruvon.engine.types import Chunk

Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class Seating:
    """How a step's sequences sit."""

    seats: list[int]  # one for each chunk
    newcomers: list[int]  # indices of chunks whose seat holds nothing of theirs yet
    moves: list[tuple[int, int]]  # (old, new) seats of sequences that moved
    patches: list[tuple[int, int]]  # (place in the flat tables, block)


class Seats:
    """Mirrors the device's block tables, int32 [seats, width], in ``tables``."""

    def __init__(self, num_seats: int, width: int, block_size: int) -> None:
        self.tables: Ints = np.zeros((num_seats, width), dtype=np.int32)
        self.block_size = block_size
        self._seat_of: dict[int, int] = {}
        self._free = list(range(num_seats))  # a heap
        self._blocks: list[list[int] | None] = [None] * num_seats  # whose table is mirrored
        self._capacity = [0] * num_seats  # how much of it, in tokens

    def assign(self, chunks: Sequence[Chunk], highest: int) -> Seating:
        """Seat a step's sequences below ``highest``, which is at least their number."""
        self._leave({chunk.seq_id for chunk in chunks})
        moves = self._move_below(highest)
        seats: list[int] = []
        newcomers: list[int] = []
        patches: list[tuple[int, int]] = []
        seat_of, mirrored, capacity = self._seat_of, self._blocks, self._capacity
        for i, chunk in enumerate(chunks):
            seat = seat_of.get(chunk.seq_id)
            if seat is None or chunk.blocks is not mirrored[seat]:  # other: it was preempted
                newcomers.append(i)
                seat = self._sit(chunk, seat)
            seats.append(seat)
            if chunk.start + len(chunk.tokens) > capacity[seat]:
                patches += self.extend(chunk)
        return Seating(seats, newcomers, moves, patches)

    def extend(self, chunk: Chunk) -> list[tuple[int, int]]:
        """Mirror as many more blocks as hold all tokens of a sequence that sits; the patches."""
        seat, blocks = self._seat_of[chunk.seq_id], chunk.blocks
        known = self._capacity[seat] // self.block_size
        needed = -(-(chunk.start + len(chunk.tokens)) // self.block_size)
        self.tables[seat, known:needed] = blocks[known:needed]
        self._capacity[seat] = needed * self.block_size
        first = seat * self.tables.shape[1]
        return [(first + i, blocks[i]) for i in range(known, needed)]

    def seat_of(self, seq_id: int) -> int:
        """Where a sequence of the step assigned last sits."""
        return self._seat_of[seq_id]

    def _leave(self, present: set[int]) -> None:
        if self._seat_of.keys() == present:
            return
        for seq_id in self._seat_of.keys() - present:
            self._vacate(self._seat_of.pop(seq_id))

    def _move_below(self, highest: int) -> list[tuple[int, int]]:
        moves = []
        for seq_id, old in self._seat_of.items():
            if old >= highest:
                new = heapq.heappop(self._free)
                self._seat_of[seq_id] = new
                self._blocks[new] = self._blocks[old]  # to be patched in full
                self._vacate(old)
                moves.append((old, new))
        return moves

    def _sit(self, chunk: Chunk, seat: int | None) -> int:
        if seat is None:
            seat = self._seat_of[chunk.seq_id] = heapq.heappop(self._free)
        self._blocks[seat], self._capacity[seat] = chunk.blocks, 0
        return seat

    def _vacate(self, seat: int) -> None:
        heapq.heappush(self._free, seat)
        self._blocks[seat], self._capacity[seat] = None, 0
