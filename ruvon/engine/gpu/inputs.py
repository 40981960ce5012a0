"""StepInputs: a plan as the words that a captured step reads.

Most steps go on where the one before was: the same sequences, each with the token it has just
sampled. Then the device counts up its own words, and is sent nothing but the blocks by which tables
have grown.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from ruvon.engine.batch import to_device
from ruvon.engine.gpu.deferred import DeferredRow
from ruvon.engine.gpu.graphs import Bucket, Graphs, StagingBuffer, Words
from ruvon.engine.gpu.persistent_batch import PersistentBatch
from ruvon.engine.gpu.sampling_state import SlotStates
from ruvon.engine.types import BEING_SAMPLED, PLACEHOLDER, Chunk, Plan


class StepInputs:
    """Writes one step after the other; each has to be launched before the next is written."""

    def __init__(
        self, batch: PersistentBatch, states: SlotStates, graphs: Graphs, block_size: int
    ) -> None:
        self._batch = batch
        self._states = states
        self._tables = graphs.tables
        self._layouts = graphs.layouts
        self._block_size = block_size
        self._steady: tuple[Bucket, list[int]] | None = None
        """The last step's sequences, if each had one token and sampled on the device."""

    def write(self, plan: Plan, bucket: Bucket, staging: StagingBuffer) -> list[DeferredRow]:
        """Fill a staging buffer with a step that fits ``bucket``; the rows that it is not to
        sample."""
        self._states.follow(plan)
        steady, self._steady = self._is_steady(plan, bucket) and self._steady, None
        if steady:
            self._advance(plan.chunks, staging.inputs[bucket])
            self._steady = steady
            return []
        staging.words[: self._layouts[bucket].size] = self._layouts[bucket].blank
        with torch.inference_mode():
            return self._start(plan, bucket, staging.inputs[bucket])

    def _is_steady(self, plan: Plan, bucket: Bucket) -> bool:
        """Whether the device can go on by itself."""
        return (
            self._steady is not None
            and self._steady[0] is bucket
            and not (plan.new or plan.ended or self._states.waiting)
            and self._steady[1] == [c.seq_id for c in plan.chunks if c.tokens == BEING_SAMPLED]
            and all(self._grows_by_one(chunk) for chunk in plan.chunks if chunk.blocks)
        )

    def _grows_by_one(self, chunk: Chunk) -> bool:
        """Whether a chunk of one token begins the block that it adds to each table."""
        tables = self._batch.tables[chunk.seq_id]
        return all(
            len(blocks) == 1 and chunk.start == len(table) * self._block_size
            for table, blocks in zip(tables, chunk.blocks, strict=True)
        )

    def _advance(self, chunks: Sequence[Chunk], inputs: dict[str, Words]) -> None:
        inputs["mode"][0] = 1
        inputs["new_blocks"][:] = -1
        for row, blocks in self._batch.grow(chunks):
            inputs["new_blocks"][:, row] = [block for (block,) in blocks]

    def _start(self, plan: Plan, bucket: Bucket, inputs: dict[str, Words]) -> list[DeferredRow]:
        assigned = self._batch.assign(plan, bucket.sequences)
        order = sorted(range(len(plan.chunks)), key=assigned.slots.__getitem__)
        chunks = [plan.chunks[i] for i in order]  # as their tokens lie in the batch
        slots = np.array([assigned.slots[i] for i in order], dtype=np.int32)
        lengths = np.array([len(chunk.tokens) for chunk in chunks], dtype=np.int32)
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
        ends = inputs["query_starts"][1:]
        ends[slots] = lengths
        np.cumsum(ends, out=ends)
        inputs["context_lens"][slots] = starts + lengths
        self._fill_tokens(chunks, sources(slots.tolist(), assigned.moves), inputs)
        self._patch(assigned.patches, inputs["patches"])
        sampling = [slot for slot, c in zip(assigned.slots, plan.chunks, strict=True) if c.samples]
        rows = np.array(sampling, dtype=np.int32)
        inputs["logit_rows"][: len(rows)] = ends[rows] - 1
        self._states.move(assigned.moves)
        self._states.renew(assigned.newcomers)
        params = inputs["params"][: len(rows)]
        deferred = self._states.fill(params, plan.rows, rows, inputs["context_lens"][rows])
        if bucket.single and len(rows) == len(chunks) and not deferred:
            self._steady = (bucket, list(plan.rows))
        return deferred

    def _fill_tokens(
        self, chunks: list[Chunk], sources: list[int], inputs: dict[str, Words]
    ) -> None:
        """Write tokens in the order of ``chunks``; ``sources``: the slot that each one's sequence
        had in the step before."""
        size, tables = self._block_size, self._batch.tables
        firsts = list(accumulate([len(chunk.tokens) for chunk in chunks], initial=0))
        ones = [i for i, chunk in enumerate(chunks) if len(chunk.tokens) == 1]
        places = [firsts[i] for i in ones]
        inputs["token_ids"][places] = [
            -1 - sources[i] if chunks[i].tokens[0] == PLACEHOLDER else chunks[i].tokens[0]
            for i in ones
        ]
        inputs["positions"][places] = [chunks[i].start for i in ones]
        for group, slots in enumerate(inputs["slots"]):
            slots[places] = [
                tables[c.seq_id][group][c.start // size] * size + c.start % size
                for c in [chunks[i] for i in ones]
            ]
        for chunk, first in zip(chunks, firsts, strict=False):
            if len(chunk.tokens) > 1:
                self._fill_run(chunk, first, inputs)

    def _fill_run(self, chunk: Chunk, place: int, inputs: dict[str, Words]) -> None:
        size, start, num = self._block_size, chunk.start, len(chunk.tokens)
        first, end = start // size, -(-(start + num) // size)
        run = slice(place, place + num)
        for group, table in enumerate(self._batch.tables[chunk.seq_id]):
            blocks = np.array(table[first:end], dtype=np.int32)
            slots = (blocks[:, None] * size + np.arange(size, dtype=np.int32)).ravel()
            inputs["slots"][group, run] = slots[start - first * size :][:num]
        inputs["token_ids"][run] = chunk.tokens
        inputs["positions"][run] = np.arange(start, start + num)

    def _patch(self, patches: list[tuple[int, int]], patches_N2: Words) -> None:
        room = len(patches_N2)
        if patches:
            patches_N2[: len(patches)] = patches[:room]
        if len(patches) > room:  # many blocks out of the prefix cache: rare
            places, blocks = to_device(
                tuple(np.array(patches[room:], dtype=np.int32).T.copy()), self._tables.device
            )
            self._tables.view(-1)[places.long()] = blocks


def sources(slots: list[int], moves: list[tuple[int, int]]) -> list[int]:
    """The slots in the step before of those who have ``slots`` now."""
    if not moves:
        return slots
    old_of = {new: old for old, new in moves}
    return [old_of.get(slot, slot) for slot in slots]
