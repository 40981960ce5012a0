"""What the host does for a GPU's step before it is launched: its words, and what is kept of slots.

    python bench/inputs.py [--sequences 256] [--context 1000] [--steps 300]

Microseconds of processor time (the median) of a step of one token a sequence that goes on from the
one before, of such a step written anew, of one with penalties, and of one with a chunk of a prompt
and one sequence for another. It needs no GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from ruvon.engine.gpu.graphs import Bucket, StagingBuffer, StepWords
from ruvon.engine.gpu.inputs import StepInputs
from ruvon.engine.gpu.persistent_batch import PersistentBatch
from ruvon.engine.gpu.sampling_state import SlotStates
from ruvon.engine.types import BEING_SAMPLED, Chunk, NewSequence, Plan, SamplingParams
from ruvon.kernels.sample import make_state

PAGE, PROMPT = 16, 2048
PLAIN = SamplingParams(temperature=0)
PENALIZED = SamplingParams(temperature=0, presence_penalty=1.0)
KINDS = ("going on", "anew", "penalties", "mixed")


class Graphs:
    """What `StepInputs` asks of `ruvon.engine.gpu.graphs.Graphs`."""

    def __init__(self, slots: int, width: int) -> None:
        self.single = Bucket(True, slots, slots)
        self.mixed = Bucket(False, slots + PROMPT, slots)
        self.layouts = {bucket: StepWords(bucket) for bucket in (self.single, self.mixed)}
        self.tables = torch.zeros(1, slots, width, dtype=torch.int32)


@dataclass
class Decoding:
    """A sequence that samples in each step."""

    id: int
    sampling: SamplingParams
    length: int

    def blocks(self, first: int) -> tuple[int, ...]:
        return tuple(range(first, -(-self.length // PAGE)))

    def begin(self, plan: list[Chunk]) -> NewSequence:
        tokens = (1,) * self.length
        plan.append(Chunk(self.id, 0, tokens, 0, (self.blocks(0),), True))
        return NewSequence(self.id, self.sampling, self.length, self.id)

    def chunk(self) -> Chunk:
        start, self.length = self.length, self.length + 1
        blocks = (self.blocks(start // PAGE),) if start % PAGE == 0 else ()
        return Chunk(self.id, 0, BEING_SAMPLED, start, blocks, True)


def plans(kind: str, sequences: int, context: int) -> Iterator[Plan]:
    """Steps without end; those of the beginning are as long as all their prompts."""
    sampling = PENALIZED if kind == "penalties" else PLAIN
    running = [Decoding(i, sampling, context + i % PAGE) for i in range(sequences - 1)]
    for each in running:
        chunks: list[Chunk] = []
        new = each.begin(chunks)
        others = [other.chunk() for other in running[: each.id]]
        yield Plan(0, (*others, *chunks), (new,))
    fresh = sequences
    while True:
        chunks, news, ended = [], [], []
        if kind == "mixed":
            ended.append(running.pop(fresh % len(running)).id)
            running.append(Decoding(fresh, sampling, PROMPT))
            fresh += 1
        going_on = running[:-1] if ended else running
        chunks += [each.chunk() for each in going_on]
        if ended:
            news.append(running[-1].begin(chunks))
        yield Plan(0, tuple(chunks), tuple(news), tuple(ended))


def measure(kind: str, sequences: int, context: int, steps: int) -> float:
    width = (context + sequences + steps + PROMPT) // PAGE + 2
    graphs = Graphs(sequences, width)
    state = make_state(sequences, 50_000, torch.device("cpu"))
    states = SlotStates(state, [0])
    batch = PersistentBatch(sequences, width, PAGE)
    inputs = StepInputs(batch, states, graphs, PAGE)  # type: ignore[arg-type]
    words = np.zeros(max(layout.size for layout in graphs.layouts.values()), np.int32)
    views = {bucket: layout.views(words) for bucket, layout in graphs.layouts.items()}
    staging = StagingBuffer(words, views, torch.zeros(3, sequences), None)
    times = []
    for plan in islice(plans(kind, sequences, context), sequences + steps):
        single = plan.num_tokens == len(plan.chunks)
        if kind == "anew":
            inputs._steady = None
        began = time.process_time_ns()
        inputs.write(plan, graphs.single if single else graphs.mixed, staging)
        states.rows.record(plan, ((1,),) * len(plan.rows))
        times.append(time.process_time_ns() - began)
    return statistics.median(times[sequences:]) / 1e3  # without those in which all begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--context", type=int, default=1000, help="Tokens of a prompt.")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for kind in KINDS:
        print(f"{kind:12}{measure(kind, args.sequences, args.context, args.steps):9.1f} us")


if __name__ == "__main__":
    main()
