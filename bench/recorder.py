"""What the recorder adds to a step: ``python bench/recorder.py [ROWS]``.

Decodes so many sequences, a sixteenth of which take a new block in each step, and prints the median
microseconds of planning a step, of taking its result in, and of recording it: what is recorded is
found by the other two on their way, so that it is their sum that counts.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from itertools import pairwise

from ruvon.engine.blocks import BlockPool
from ruvon.engine.grouped_pool import GroupedPool
from ruvon.engine.policies import ORDERS, POLICIES, Limits
from ruvon.engine.recorder import Recorder
from ruvon.engine.scheduler import Scheduler
from ruvon.engine.types import SamplingParams, Sequence, StepResult, StepStats

PARTS = ("schedule", "commit", "record")
STEPS = 2000
STATS = StepStats(1, 256, 256, 0, 10, 100, 0, 0, 0, 0.1)


def decoding(rows: int) -> Scheduler:
    """A scheduler with as many on their way, whose prompts are computed."""
    limits = Limits(rows, 1 << 20, POLICIES["continuous"], ORDERS["fcfs"])
    num_blocks = rows * (STEPS // 16 + 8)
    scheduler = Scheduler(GroupedPool(BlockPool(num_blocks, 16)), limits)
    for id in range(rows):
        prompt = [id] * (16 + id % 16)
        scheduler.add(Sequence(id, 0, SamplingParams(), prompt, len(prompt), STEPS + 50, 0))
    return scheduler


def main(rows: int) -> None:
    gc.freeze()  # as a server does
    scheduler, recorder = decoding(rows), Recorder()
    times: list[list[float]] = []
    plan, work = scheduler.schedule(0.0), scheduler.work
    for _ in range(STEPS):  # with one step under way, as on a GPU
        marks = [time.perf_counter()]
        following = scheduler.schedule(0.0)
        marks.append(time.perf_counter())
        assert plan is not None
        result = StepResult(((9,),) * len(plan.rows), (None,) * len(plan.rows))
        scheduler.commit(plan, result)
        marks.append(time.perf_counter())
        recorder.stepped(plan, 0.0, 1.0, STATS, work, scheduler.finished)
        marks.append(time.perf_counter())
        times.append([1e6 * (end - begin) for begin, end in pairwise(marks)])
        plan, work = following, scheduler.work
    medians = [statistics.median(part) for part in zip(*times, strict=True)]
    print(f"steps of {rows} rows, microseconds")
    for part, median in zip((*PARTS, "sum"), (*medians, sum(medians)), strict=True):
        print(f"{part:10}{median:8.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
