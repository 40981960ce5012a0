"""StepInputs: a plan as the words that a captured step reads.

Most steps go on where the one before was: the same sequences, each with the token it has just been
given. Then the words of the one before are copied and counted up, which takes a few operations
whatever the number of sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from ruvon.engine.gpu.graphs import Box, Bucket, Graphs, Words
from ruvon.engine.gpu.seats import Seating, Seats
from ruvon.engine.gpu.seatwork import SeatWork
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
        layout = self._layouts[bucket]
        box.words[: layout.size] = layout.blank
        self._num_patches = 0
        inputs = box.inputs[bucket]
        seating = self._seats.assign(plan.chunks, bucket.sequences)
        order = sorted(range(len(plan.chunks)), key=seating.seats.__getitem__)
        chunks = [plan.chunks[i] for i in order]
        seats = np.array([seating.seats[i] for i in order], dtype=np.int32)
        lengths = np.ones_like(seats)
        if not bucket.single:
            lengths[:] = [len(chunk.tokens) for chunk in chunks]
        ends = inputs["query_starts"][1:]
        ends[seats] = lengths
        np.cumsum(ends, out=ends)
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
        inputs["context_lens"][seats] = starts + lengths
        self._fill_tokens(chunks, sources(seats.tolist(), seating), bucket.single, inputs)
        self._patch(seating.patches, inputs["patches"])
        samples = [i for i, chunk in enumerate(plan.chunks) if chunk.samples]
        row_seats = np.array([seating.seats[i] for i in samples], dtype=np.int32)
        inputs["logit_rows"][: len(samples)] = ends[row_seats] - 1
        with torch.inference_mode():
            self._work.move(seating.moves)
            self._work.fill(
                inputs["params"][: len(samples)],
                plan.rows,
                row_seats,
                inputs["context_lens"][row_seats],
                {seating.seats[i] for i in seating.newcomers},
            )
        self._round = None
        if bucket.single and len(samples) == len(chunks):
            self._round = Round(bucket, [chunk.seq_id for chunk in plan.chunks], order, seats)

    def _fill_tokens(
        self, chunks: list[Chunk], sources: list[int], single: bool, inputs: dict[str, Words]
    ) -> None:
        """Write tokens in the order of ``chunks``; ``sources``: where each one's sequence sat in
        the step before."""
        size = self._seats.block_size
        places: slice | list[int] = slice(len(chunks))
        if not single:
            firsts = accumulate([len(chunk.tokens) for chunk in chunks], initial=0)
            begun = list(zip(chunks, firsts, sources, strict=False))
            for chunk, first, _ in begun:
                if len(chunk.tokens) > 1:
                    self._fill_run(chunk, first, inputs)
            ones = [one for one in begun if len(one[0].tokens) == 1]
            if not ones:
                return
            chunks, places, sources = (list(column) for column in zip(*ones, strict=True))
        ids = [chunk.tokens[0] for chunk in chunks]
        inputs["token_ids"][places] = [
            -1 - seat if token == UNDRAWN else token
            for token, seat in zip(ids, sources, strict=True)
        ]
        inputs["positions"][places] = [chunk.start for chunk in chunks]
        inputs["slots"][places] = [
            chunk.blocks[chunk.start // size] * size + chunk.start % size for chunk in chunks
        ]

    def _fill_run(self, chunk: Chunk, place: int, inputs: dict[str, Words]) -> None:
        size, start, num = self._seats.block_size, chunk.start, len(chunk.tokens)
        first = start // size
        blocks = np.array(chunk.blocks[first : -(-(start + num) // size)], dtype=np.int32)
        slots = (blocks[:, None] * size + np.arange(size, dtype=np.int32)).ravel()
        run = slice(place, place + num)
        inputs["token_ids"][run] = chunk.tokens
        inputs["positions"][run] = np.arange(start, start + num)
        inputs["slots"][run] = slots[start - first * size :][:num]

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


def sources(seats: list[int], seating: Seating) -> list[int]:
    """Where those who sit on ``seats`` sat in the step before."""
    if not seating.moves:
        return seats
    old_of = {new: old for old, new in seating.moves}
    return [old_of.get(seat, seat) for seat in seats]
