"""A step's words: going on from those of the step before is as good as writing them anew."""

import random

import numpy as np
import pytest
import torch

from ruvon.engine.gpu.graphs import Bucket, StagingBuffer, StepWords
from ruvon.engine.gpu.inputs import StepInputs
from ruvon.engine.gpu.persistent_batch import PersistentBatch
from ruvon.engine.gpu.sampling_state import SlotStates
from ruvon.engine.types import BEING_SAMPLED, Chunk, NewSequence, Plan, SamplingParams
from ruvon.kernels import sample
from ruvon.kernels.staging import load_inputs

pytestmark = pytest.mark.usefixtures("triton_device")
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SLOTS, PAGE, LONGEST = 6, 4, 80
WINDOWS = ((0,), (0, 9), (5, 0, 9))  # of the cache groups
SINGLE = [Bucket(True, n, n) for n in (2, 4, 6)]
MIXED = Bucket(False, 256, 6)


class Tables:
    """What `StepInputs` asks of `Graphs`."""

    def __init__(self, num_groups):
        self.layouts = {bucket: StepWords(bucket, num_groups) for bucket in [*SINGLE, MIXED]}
        shape = (num_groups, SLOTS, LONGEST // PAGE)
        self.tables = torch.zeros(shape, dtype=torch.int32, device=DEVICE)


class Writer:
    """Writes steps into staging, from where the device loads them."""

    def __init__(self, forgetful, windows):
        self._graphs, self._forgetful = Tables(len(windows)), forgetful
        self._state = sample.make_state(SLOTS, 50, DEVICE)
        self._state.last_tokens.copy_(torch.arange(SLOTS))
        batch = PersistentBatch(SLOTS, LONGEST // PAGE, PAGE, windows)
        self._inputs = StepInputs(batch, SlotStates(self._state, [0]), self._graphs, PAGE)
        size = max(layout.size for layout in self._graphs.layouts.values())
        words = np.zeros(size, np.int32)
        inputs = {bucket: layout.views(words) for bucket, layout in self._graphs.layouts.items()}
        self._staging = StagingBuffer(words, inputs, torch.zeros(3, SLOTS), None)
        self._words = torch.zeros(size, dtype=torch.int32, device=DEVICE)

    def write(self, plan, bucket):
        """The inputs on the device, and whether it went on by itself."""
        if self._forgetful:
            self._inputs._steady = None
        self._inputs.write(plan, bucket, self._staging)
        layout = self._graphs.layouts[bucket]
        load_inputs(
            torch.from_numpy(self._staging.words)[None].to(DEVICE),
            torch.zeros(1, dtype=torch.int32, device=DEVICE),
            self._words[: layout.size],
            layout.views(self._words),
            self._state.last_tokens,
            self._graphs.tables,
            PAGE,
        )
        words = self._words.cpu().numpy()
        inputs = {name: values.copy() for name, values in layout.views(words).items()}
        for name in ("mode", "new_blocks", "patches"):
            del inputs[name]
        inputs["tables"] = self._graphs.tables.cpu().numpy()
        return inputs, bool(self._staging.inputs[bucket]["mode"][0])


class Running:
    """A sequence on its way."""

    def __init__(self, i, rng, num_groups):
        self.num_prompt, self.num_computed = rng.randint(1, 30), 0
        self.most = self.num_prompt + rng.randint(1, 39)
        self.blocks = [
            [rng.randrange(1000) for _ in range(LONGEST // PAGE)] for _ in range(num_groups)
        ]
        sampling = SamplingParams(temperature=rng.choice([0.0, 1.0]), min_tokens=i % 5 // 4)
        self.new = NewSequence(i, sampling, self.num_prompt, i)

    def chunk(self, known=False):
        """``known``: whether it missed the step before, so that its token is."""
        start = self.num_computed
        tokens = BEING_SAMPLED if start else tuple(range(self.num_prompt))
        if known and start:
            tokens = (7,)
        self.num_computed += len(tokens)
        known = -(-start // PAGE)
        end = -(-self.num_computed // PAGE)
        blocks = tuple(tuple(table[known:end]) for table in self.blocks) if end > known else ()
        return Chunk(self.new.seq_id, 0, tokens, start, blocks, True)


def plans(rng, num_groups):
    """Sequences come, sample and go, as many at a time as there are slots; now and then one misses
    a step."""
    coming, running, step = (Running(i, rng, num_groups) for i in range(12)), [], 0
    missed = None
    while True:
        newcomers = []
        if step % 7 == 0:
            newcomers = [s for _, s in zip(range(SLOTS - len(running)), coming, strict=False)]
        running += newcomers
        if not running:
            return
        is_late, missed = missed, running[-1] if step % 6 == 4 and len(running) > 1 else None
        chunks = tuple(seq.chunk(seq is is_late) for seq in running if seq is not missed)
        yield Plan(step, chunks, tuple(seq.new for seq in newcomers))
        running = [seq for seq in running if seq.num_computed < seq.most]
        step += 1


@pytest.mark.parametrize("windows", WINDOWS)
def test_going_on_is_what_starting_anew_would_be(windows):
    going, forgetful = (Writer(forgetful, windows) for forgetful in (False, True))
    num_short = num_steps = 0
    for plan in plans(random.Random(3), len(windows)):
        num = len(plan.chunks)
        bucket = MIXED
        if plan.num_tokens == num:
            bucket = next(b for b in SINGLE if b.sequences >= num)
        words, short = going.write(plan, bucket)
        expected, _ = forgetful.write(plan, bucket)
        for name, values in expected.items():
            np.testing.assert_array_equal(words[name], values, err_msg=f"{name}, {plan.step}")
        num_steps += 1
        num_short += short
    assert num_short > num_steps / 3
    assert num_short < num_steps
