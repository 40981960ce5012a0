"""PersistentBatch: which row of the device's tables each sequence of a step has, and what changes
in them.

Block tables live on the device and change little from step to step, so a step sends only changes.
A sequence keeps its row, its *slot*, as long as every step has a chunk of it; whoever misses a step
loses it, and gets another, written anew from what plans have said. Slots are kept low, because a
step's cost on the device depends on the highest.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ruvon.engine.batch import BlockTables
from ruvon.engine.types import Chunk, Plan


@dataclass(frozen=True, slots=True)
class Assignment:
    """The slots of a step's sequences."""

    slots: list[int]  # one for each chunk
    newcomers: set[int]  # slots that hold nothing yet of those they belong to now
    moves: list[tuple[int, int]]  # (old, new) slots of sequences that moved
    patches: list[tuple[int, int]]  # (place in the flat tables, block)


class PersistentBatch:
    """Gives out the slots of the device's block tables, int32 [slots, width]."""

    def __init__(self, num_slots: int, width: int) -> None:
        self.tables = BlockTables()
        self._width = width
        self._slot_of: dict[int, int] = {}
        self._free = list(range(num_slots))  # a heap
        self._num_written = [0] * num_slots  # leading blocks of the table that the device has

    def assign(self, plan: Plan, highest: int) -> Assignment:
        """Take in a plan, and place its sequences below ``highest``, which is at least their
        number."""
        self.tables.follow(plan)
        self._drop({chunk.seq_id for chunk in plan.chunks}.difference(s.seq_id for s in plan.new))
        moves = self._move_below(highest)
        slots: list[int] = []
        newcomers: set[int] = set()
        patches: list[tuple[int, int]] = []
        for chunk in plan.chunks:
            slot = self._slot_of.get(chunk.seq_id)
            if slot is None:
                slot = self._slot_of[chunk.seq_id] = heapq.heappop(self._free)
                newcomers.add(slot)
            slots.append(slot)
            if len(self.tables[chunk.seq_id]) > self._num_written[slot]:
                patches += self._write(chunk.seq_id, slot)
        return Assignment(slots, newcomers, moves, patches)

    def grow(self, chunks: Sequence[Chunk]) -> list[tuple[int, int]]:
        """Take in a plan of the same sequences as the one before, each of which has one token: for
        those whose table has grown, their index and the block."""
        grown = [(i, chunk) for i, chunk in enumerate(chunks) if chunk.blocks]
        for _, chunk in grown:
            self.tables[chunk.seq_id] += chunk.blocks
            self._num_written[self._slot_of[chunk.seq_id]] += 1
        return [(i, chunk.blocks[0]) for i, chunk in grown]

    def _write(self, seq_id: int, slot: int) -> list[tuple[int, int]]:
        """Patches for the blocks that the device does not have."""
        table, known = self.tables[seq_id], self._num_written[slot]
        self._num_written[slot] = len(table)
        first = slot * self._width + known
        return list(enumerate(table[known:], first))

    def _drop(self, staying: set[int]) -> None:
        if self._slot_of.keys() != staying:
            for seq_id in self._slot_of.keys() - staying:
                self._vacate(self._slot_of.pop(seq_id))

    def _move_below(self, highest: int) -> list[tuple[int, int]]:
        moves = []
        for seq_id, old in self._slot_of.items():
            if old >= highest:
                new = self._slot_of[seq_id] = heapq.heappop(self._free)
                self._vacate(old)
                moves.append((old, new))
        return moves

    def _vacate(self, slot: int) -> None:
        heapq.heappush(self._free, slot)
        self._num_written[slot] = 0
