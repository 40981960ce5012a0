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

import numpy as np

from ruvon.engine.batch import BlockTables, Ints, Windows, ints
from ruvon.engine.blocks import first_block
from ruvon.engine.types import Blocks, Chunk, Plan


@dataclass(frozen=True, slots=True)
class Assignment:
    """The slots of a step's sequences."""

    slots: Ints  # one for each chunk
    sources: Ints  # the slots that they had in the step before
    newcomers: list[int]  # sequences whose slots hold nothing yet of theirs
    moves: list[tuple[int, int]]  # (old, new) slots of sequences that moved
    patches_N2: Ints  # (place in the flat tables, block)


class PersistentBatch:
    """Gives out the slots of the device's block tables, int32 [cache groups, slots, width]."""

    def __init__(
        self, num_slots: int, width: int, block_size: int, windows: Windows = (0,)
    ) -> None:
        self.tables = BlockTables()
        self._placed = np.zeros((len(windows), num_slots, width), dtype=np.int32)  # as the device's
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
        newcomers: list[int] = []
        places: list[int] = []
        for chunk in plan.chunks:
            slot = self._slot_of.get(chunk.seq_id)
            if slot is None:
                slot = self._slot_of[chunk.seq_id] = heapq.heappop(self._free)
                newcomers.append(chunk.seq_id)
                blank.add(slot)
            slots.append(slot)
            if chunk.blocks or slot in blank:
                places += self._place(chunk, slot, slot in blank)
        changed = ints(places)
        patches_N2 = np.column_stack((changed, self._placed.ravel()[changed]))
        old_of = {new: old for old, new in moves}
        sources = [old_of.get(slot, slot) for slot in slots] if moves else slots
        return Assignment(ints(slots), ints(sources), newcomers, moves, patches_N2)

    def grow(self, chunks: Sequence[Chunk]) -> list[tuple[int, Blocks]]:
        """Take in a plan of the same sequences as the one before, each of which has one token: for
        those whose tables have grown, their index and the blocks."""
        grown = [(i, chunk) for i, chunk in enumerate(chunks) if chunk.blocks]
        for _, chunk in grown:
            self.tables.extend(chunk)
            self._place(chunk, self._slot_of[chunk.seq_id], anew=False)
        return [(i, chunk.blocks) for i, chunk in grown]

    def cache_slots(self, slot_T: Ints, position_T: Ints) -> Ints:
        """Where tokens go in the cache of each group, [groups, T], by their sequences' slots here
        and their positions."""
        blocks_GT: Ints = self._placed[:, slot_T, position_T // self._block_size]
        return blocks_GT * self._block_size + position_T % self._block_size

    def _place(self, chunk: Chunk, slot: int, anew: bool) -> list[int]:
        """The places in the flat tables of blocks that the chunk brings; if they are written
        ``anew``, of all that this step or a later one looks at."""
        places: list[int] = []
        _, num_slots, width = self._placed.shape
        for group, table in enumerate(self.tables[chunk.seq_id]):
            if anew:
                first = first_block(chunk.start, self._windows[group], self._block_size)
            else:
                first = len(table) - len(chunk.blocks[group])
            self._placed[group, slot, first : len(table)] = table[first:]
            row = (group * num_slots + slot) * width
            places += range(row + first, row + len(table))
        return places

    def _drop(self, staying: set[int]) -> None:
        if self._slot_of.keys() != staying:
            for seq_id in self._slot_of.keys() - staying:
                heapq.heappush(self._free, self._slot_of.pop(seq_id))

    def _move_below(self, highest: int) -> list[tuple[int, int]]:
        moves = []
        for seq_id, old in self._slot_of.items():
            if old >= highest:
                new = self._slot_of[seq_id] = heapq.heappop(self._free)
                heapq.heappush(self._free, old)
                moves.append((old, new))
        return moves
