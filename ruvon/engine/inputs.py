"""StepInputs: a plan as the words that a captured step reads.

Most steps go on where the one before was: the same sequences, each with the token it has just been
given. Then the words of the one before are copied and counted up, which takes a few operations
whatever the number of sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from ruvon.engine.graphs import Box, Bucket, Graphs, Words
from ruvon.engine.seats import Seating, Seats
from ruvon.engine.seatwork import SeatWork
from ruvon.engine.types import JUST_UNDRAWN, UNDRAWN, Chunk, Plan
from ruvon.kernels import sample


@dataclass(frozen=True, slots=True)
class Round:
    """What the words of a step in which every sequence draws after one token were made of."""

    bucket: Bucket
    seq_ids: list[int]  # in the order of the plan
    chunk_at: list[int]  # by place: tokens lie in the order of seats
    seats: Words  # by place


class StepInputs:
    """Writes one step after the other; each has to be launched before the next is written."""

    def __init__(self, seats: Seats, work: SeatWork, graphs: Graphs) -> None:
        """``seats`` mirrors the block tables of ``graphs``."""
        self._seats = seats
        self._work = work
        self._tables = graphs.tables
        self._layouts = graphs.layouts
        self._round: Round | None = None  # if the last step was one
        self._words: Words  # of the last step
        self._num_patches = 0  # in them

    def write(self, plan: Plan, bucket: Bucket, box: Box) -> None:
        """Fill ``box`` with a step that fits ``bucket``."""
        chunks, last = plan.chunks, self._round
        if (
            last is not None
            and last.bucket is bucket
            and not self._work.waiting
            and len(chunks) == len(last.seq_ids)
            and [c.seq_id for c in chunks if c.tokens is JUST_UNDRAWN] == last.seq_ids
        ):
            self._go_on(chunks, last, box)
        else:
            self._start(plan, bucket, box)
        self._words = box.words

    def _go_on(self, chunks: tuple[Chunk, ...], last: Round, box: Box) -> None:
        size, num = self._layouts[last.bucket].size, len(chunks)
        box.words[:size] = self._words[:size]
        inputs = box.inputs[last.bucket]
        inputs["token_ids"][:num] = -1 - last.seats
        inputs["context_lens"][last.seats] += 1
        inputs["params"][:num, sample.DRAW] += 1
        positions, slots = inputs["positions"][:num], inputs["slots"][:num]
        positions += 1
        slots += 1
        patches: list[tuple[int, int]] = []
        block_size = self._seats.block_size
        for place in np.flatnonzero(positions % block_size == 0).tolist():
            chunk = chunks[last.chunk_at[place]]
            patches += self._seats.extend(chunk)
            slots[place] = chunk.blocks[chunk.start // block_size] * block_size
        self._patch(patches, inputs["patches"])

    def _start(self, plan: Plan, bucket: Bucket, box: Box) -> None:
        layout, chunks = self._layouts[bucket], plan.chunks
        box.words[: layout.size] = layout.blank
        self._num_patches = 0
        inputs = box.inputs[bucket]
        seating = self._seats.assign(chunks, bucket.sequences)
        with torch.inference_mode():
            self._work.move(seating.moves)
        seats = np.array(seating.seats, dtype=np.int32)
        lengths = [1] * len(chunks) if bucket.single else [len(c.tokens) for c in chunks]
        queries = np.array(lengths, dtype=np.int32)
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
        inputs["context_lens"][seats] = starts + queries
        ends = inputs["query_starts"][1:]
        ends[seats] = queries
        np.cumsum(ends, out=ends)
        first = inputs["query_starts"][seats]
        distances: Words = starts - first
        order: Words = np.argsort(seats).astype(np.int32)  # a chunk by its rank
        self._fill_tokens(chunks, seating, (seats, queries, distances, order), inputs)
        self._patch(seating.patches, inputs["patches"])
        samples = np.array([chunk.samples for chunk in chunks])
        num_rows, row_seats = len(plan.rows), seats[samples]
        inputs["logit_rows"][:num_rows] = (first + queries - 1)[samples]
        with torch.inference_mode():
            self._work.fill(
                inputs["params"][:num_rows],
                plan.rows,
                row_seats,
                inputs["context_lens"][row_seats],
                {seating.seats[i] for i in seating.newcomers},
            )
        self._round = None
        if bucket.single and num_rows == len(chunks):
            seq_ids = [chunk.seq_id for chunk in chunks]
            self._round = Round(bucket, seq_ids, order.tolist(), seats[order])

    def _fill_tokens(
        self,
        chunks: tuple[Chunk, ...],
        seating: Seating,
        layout: tuple[Words, Words, Words, Words],
        inputs: dict[str, Words],
    ) -> None:
        """``layout``: each chunk's seat, number of tokens, and distance from a token's place to its
        position; and the chunks' order by seat."""
        seats, queries, distances, order = layout
        tokens = chain.from_iterable([chunks[i].tokens for i in order.tolist()])
        ids = np.array(list(tokens), dtype=np.int32)
        num = len(ids)
        owner = np.repeat(order, queries[order])  # a token's chunk
        undrawn = ids == UNDRAWN
        if undrawn.any():
            ids[undrawn] = -1 - sources(seating)[owner[undrawn]]
        positions = np.arange(num, dtype=np.int32) + distances[owner]
        blocks = self._seats.tables[seats[owner], positions // self._seats.block_size]
        inputs["token_ids"][:num] = ids
        inputs["positions"][:num] = positions
        inputs["slots"][:num] = blocks * self._seats.block_size + positions % self._seats.block_size

    def _patch(self, patches: list[tuple[int, int]], patches_N2: Words) -> None:
        if self._num_patches:
            patches_N2[: self._num_patches] = -1
        self._num_patches = 0
        if len(patches) > len(patches_N2):
            # Many blocks out of the prefix cache: rare, and then a copy of all costs little.
            self._tables.copy_(torch.from_numpy(self._seats.tables))
        elif patches:
            self._num_patches = len(patches)
            patches_N2[: len(patches)] = patches


def sources(seating: Seating) -> Words:
    """For each chunk, where its sequence sat in the step before."""
    seats = np.array(seating.seats, dtype=np.int32)
    for old, new in seating.moves:
        seats[seats == new] = old
    return seats
