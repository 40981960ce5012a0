"""A step's words: counting up those of the step before is as good as writing them anew."""

import random
from dataclasses import replace

import numpy as np
import torch

from ruvon.engine.gpu.graphs import Box, Bucket, Layout
from ruvon.engine.gpu.inputs import StepInputs
from ruvon.engine.gpu.seats import Seats
from ruvon.engine.gpu.seatwork import SeatWork
from ruvon.engine.types import JUST_UNDRAWN, Chunk, Plan, SamplingParams, Sequence
from ruvon.kernels import sample

SEATS, PAGE, LONGEST = 6, 4, 80
SINGLE = [Bucket(True, n, n) for n in (2, 4, 6)]
MIXED = Bucket(False, 256, 6)


class Tables:
    """What `StepInputs` asks of `Graphs`."""

    def __init__(self):
        self.layouts = {bucket: Layout(bucket) for bucket in [*SINGLE, MIXED]}
        self.tables = torch.zeros(SEATS, LONGEST // PAGE, dtype=torch.int32)


class Writer:
    """Writes steps into its own boxes, and applies their patches as a device would."""

    def __init__(self, forgetful):
        self._graphs, self._forgetful = Tables(), forgetful
        state = sample.make_state(SEATS, 50, torch.device("cpu"))
        seats = Seats(SEATS, LONGEST // PAGE, PAGE)
        self._inputs = StepInputs(seats, SeatWork(state, [0]), self._graphs)
        self._boxes = [self._make_box() for _ in range(3)]

    def _make_box(self):
        words = np.zeros(max(layout.size for layout in self._graphs.layouts.values()), np.int32)
        inputs = {bucket: layout.views(words) for bucket, layout in self._graphs.layouts.items()}
        return Box(words, inputs, np.zeros((3, SEATS), np.int32), None)

    def write(self, plan, bucket):
        """The inputs, with the block tables they lead to in place of patches; whether it took the
        short way."""
        if self._forgetful:
            self._inputs._round = None
        box = self._boxes[plan.step % 3]
        before = self._inputs._round
        self._inputs.write(plan, bucket, box)
        inputs = {name: values.copy() for name, values in box.inputs[bucket].items()}
        for place, block in inputs.pop("patches").tolist():
            if place >= 0:
                self._graphs.tables.view(-1)[place] = block
        return {**inputs, "tables": self._graphs.tables.numpy().copy()}, (
            before is not None and self._inputs._round is before
        )


def sequences(rng):
    for i in range(30):
        num_prompt = rng.randint(1, 30)
        sampling = SamplingParams(seed=i, temperature=rng.choice([0.0, 1.0]), min_tokens=i % 5 // 4)
        yield Sequence(
            id=i, index=0, sampling=sampling, tokens=list(range(num_prompt)), seed=i,
            num_prompt=num_prompt, max_tokens=rng.randint(2, 40),
            blocks=[rng.randrange(1000) for _ in range(LONGEST // PAGE)],
        )  # fmt: skip


def plans(rng):
    """Sequences come, draw and go, as many at a time as there are seats."""
    coming, running, step = sequences(rng), [], 0
    while True:
        newcomers = []
        if step % 7 == 0:
            newcomers = [s for _, s in zip(range(SEATS - len(running)), coming, strict=False)]
        if not running and not newcomers:
            return
        chunks = []
        for seq in running:
            chunks.append(Chunk(seq.id, JUST_UNDRAWN, seq.num_computed, seq.blocks, True))
            seq.num_computed += 1
        for seq in newcomers:
            seq.num_computed = seq.num_prompt
            chunks.append(Chunk(seq.id, tuple(seq.tokens), 0, seq.blocks, True))
        running += newcomers
        yield Plan(step, tuple(chunks), tuple(seq.row for seq in running))
        running = [s for s in running if s.num_computed < s.num_prompt + s.max_tokens - 1]
        step += 1


def test_going_on_writes_what_starting_anew_would():
    rng = random.Random(3)
    going, forgetful = Writer(False), Writer(True)
    num_short = num_steps = 0
    for plan in plans(rng):
        num = len(plan.chunks)
        bucket = MIXED
        if plan.num_tokens == num:
            bucket = next(b for b in SINGLE if b.sequences >= num)
        words, short = going.write(plan, bucket)
        expected, _ = forgetful.write(replace(plan), bucket)
        for name, values in expected.items():
            np.testing.assert_array_equal(words[name], values, err_msg=f"{name}, {plan.step}")
        num_steps += 1
        num_short += short
    assert num_short > num_steps / 3
    assert num_short < num_steps
