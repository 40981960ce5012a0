"""StepInputs: a plan as the words that a captured step reads.

Most steps go on where the one before was: the same sequences, each with the token it has just
sampled. Then the device counts up its own words, and is sent nothing but the blocks by which tables
have grown.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
import torch

from ruvon.engine.batch import Ints, ints, places, to_device
from ruvon.engine.gpu.graphs import Bucket, Graphs, StagingBuffer
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
        self._steady: tuple[Bucket, tuple[int, ...]] | None = None
        """The last step's sequences, if each had one token and sampled."""

    def write(self, plan: Plan, bucket: Bucket, staging: StagingBuffer) -> None:
        """Fill a staging buffer with a step that fits ``bucket``."""
        self._states.follow(plan)
        goes_on, self._steady = self._is_steady(plan, bucket), None
        inputs = staging.inputs[bucket]
        if goes_on:
            self._advance(plan.chunks, inputs)
        else:
            staging.words[: self._layouts[bucket].size] = self._layouts[bucket].blank
            with torch.inference_mode():
                self._start(plan, bucket.sequences, inputs)
        if bucket.single and len(plan.rows) == len(plan.chunks):
            self._steady = (bucket, plan.rows)

    def _is_steady(self, plan: Plan, bucket: Bucket) -> bool:
        """Whether the device can go on by itself."""
        return (
            self._steady == (bucket, plan.rows)
            and not (plan.new or plan.ended or self._states.waiting)
            and [chunk.tokens for chunk in plan.chunks].count(BEING_SAMPLED) == len(plan.chunks)
            and all(self._grows_by_one(chunk) for chunk in plan.chunks if chunk.blocks)
        )

    def _grows_by_one(self, chunk: Chunk) -> bool:
        """Whether a chunk of one token begins the block that it adds to each table."""
        tables = self._batch.tables[chunk.seq_id]
        return all(
            len(blocks) == 1 and chunk.start == len(table) * self._block_size
            for table, blocks in zip(tables, chunk.blocks, strict=True)
        )

    def _advance(self, chunks: Sequence[Chunk], inputs: dict[str, Ints]) -> None:
        inputs["mode"][0] = 1
        inputs["new_blocks"][:] = -1
        for row, blocks in self._batch.grow(chunks):
            inputs["new_blocks"][:, row] = [block for (block,) in blocks]

    def _start(self, plan: Plan, highest: int, inputs: dict[str, Ints]) -> None:
        assigned = self._batch.assign(plan, highest)
        order = assigned.slots.argsort()
        chunks = [plan.chunks[i] for i in order.tolist()]  # as their tokens lie in the batch
        slots, sources = assigned.slots[order], assigned.sources[order]
        lengths = [len(chunk.tokens) for chunk in chunks]
        ends = inputs["query_starts"][1:]
        ends[slots] = lengths
        np.cumsum(ends, out=ends)
        inputs["context_lens"][slots] = ints([chunk.start for chunk in chunks]) + lengths
        owner, positions = places(chunks, ints([*accumulate(lengths, initial=0)]))
        inputs["token_ids"][: len(owner)] = token_ids(chunks, sources[owner])
        inputs["positions"][: len(owner)] = positions
        inputs["slots"][:, : len(owner)] = self._batch.cache_slots(slots[owner], positions)
        self._patch(assigned.patches_N2, inputs["patches"])
        rows = assigned.slots[[chunk.samples for chunk in plan.chunks]]
        inputs["logit_rows"][: len(rows)] = ends[rows] - 1
        self._states.move(assigned.moves)
        self._states.renew(assigned.newcomers)
        params = inputs["params"][: len(rows)]
        self._states.fill(params, plan.rows, rows, inputs["context_lens"][rows])

    def _patch(self, patches_N2: Ints, room_N2: Ints) -> None:
        room = len(room_N2)
        room_N2[: len(patches_N2)] = patches_N2[:room]
        if len(patches_N2) > room:  # many blocks out of the prefix cache: rare
            places, blocks = to_device(
                tuple(np.ascontiguousarray(patches_N2[room:].T)), self._tables.device
            )
            self._tables.view(-1)[places.long()] = blocks


def token_ids(chunks: Sequence[Chunk], source_T: Ints) -> Ints:
    """The tokens of chunks, [T]; where one is being sampled, by which slot."""
    ids_T = np.fromiter(
        chain.from_iterable([chunk.tokens for chunk in chunks]), np.int32, len(source_T)
    )
    return np.where(ids_T == PLACEHOLDER, -1 - source_T, ids_T)
