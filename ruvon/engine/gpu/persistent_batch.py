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
from typing import TypeAlias

from ruvon.engine.batch import BlockTables, Windows
from ruvon.engine.blocks import first_block
from ruvon.engine.types import Blocks, Chunk, Plan

Patches: TypeAlias = list[tuple[int, int]]
"""(place, block)."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The slots of a step's sequences."""

    slots: list[int]  # one for each chunk
    newcomers: set[int]  # slots that hold nothing yet of those they belong to now
    moves: list[tuple[int, int]]  # (old, new) slots of sequences that moved
    patches: Patches  # of the flat tables


class PersistentBatch:
    """Gives out the slots of the device's block tables, int32 [cache groups, slots, width]."""

    def __init__(
        self, num_slots: int, width: int, block_size: int, windows: Windows = (0,)
    ) -> None:
        self.tables = BlockTables()
        self._num_slots = num_slots
        self._width = width
        self._block_size = block_size
        self._windows = windows
        self._slot_of: dict[int, int] = {}
        self._free = list(range(num_slots))  # a heap

    def assign(self, plan: Plan, highest: int) -> Assignment:
        """Take in a plan, and place its sequences below ``highest``, which is at least their
        number."""
        self.tables.follow(plan)
        self._drop({chunk.seq_id for chunk in plan.chunks}.difference(s.seq_id for s in plan.new))
        moves = self._move_below(highest)
        blank = {new for _, new in moves}  # slots of which the device has no table yet
        slots: list[int] = []
        newcomers: set[int] = set()
        patches: Patches = []
        for chunk in plan.chunks:
            slot = self._slot_of.get(chunk.seq_id)
            if slot is None:
                slot = self._slot_of[chunk.seq_id] = heapq.heappop(self._free)
                newcomers.add(slot)
            slots.append(slot)
            if slot in newcomers or slot in blank:
                patches += self._write(chunk, slot)
            elif chunk.blocks:
                patches += self._write_added(chunk, slot)
        return Assignment(slots, newcomers, moves, patches)

    def grow(self, chunks: Sequence[Chunk]) -> list[tuple[int, Blocks]]:
        """Take in a plan of the same sequences as the one before, each of which has one token: for
        those whose tables have grown, their index and the blocks."""
        grown = [(i, chunk) for i, chunk in enumerate(chunks) if chunk.blocks]
        for _, chunk in grown:
            self.tables.extend(chunk)
        return [(i, chunk.blocks) for i, chunk in grown]

    def _write(self, chunk: Chunk, slot: int) -> Patches:
        """Patches for all blocks that this step or a later one looks at."""
        patches: Patches = []
        for group, table in enumerate(self.tables[chunk.seq_id]):
            first = first_block(chunk.start, self._windows[group], self._block_size)
            patches += enumerate(table[first:], self._place(group, slot) + first)
        return patches

    def _write_added(self, chunk: Chunk, slot: int) -> Patches:
        """Patches for the blocks that the chunk brings."""
        patches: Patches = []
        for group, blocks in enumerate(chunk.blocks):
            first = len(self.tables[chunk.seq_id][group]) - len(blocks)
            patches += enumerate(blocks, self._place(group, slot) + first)
        return patches

    def _place(self, group: int, slot: int) -> int:
        """Of a table among all, as flat."""
        return (group * self._num_slots + slot) * self._width

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
