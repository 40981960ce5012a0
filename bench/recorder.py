"""What the recorder adds to a step: ``python bench/recorder.py [ROWS]``.

Feeds it steps of so many single tokens, every sixteenth of which takes a new block, and prints the
median time of one in microseconds.
"""

from __future__ import annotations

import statistics
import sys
import time

from ruvon.engine.recorder import Recorder
from ruvon.engine.types import BEING_SAMPLED, Chunk, Emission, Plan, StepStats

STATS = StepStats(1, 256, 256, 0, 10, 100, 0, 0, 0, 0.1)


def plan(number: int, rows: int) -> Plan:
    chunks = [
        Chunk(row, 0, BEING_SAMPLED, number, ((number,),) if row % 16 == number % 16 else (), True)
        for row in range(rows)
    ]
    return Plan(number, tuple(chunks))


def main(rows: int) -> None:
    recorder = Recorder()
    plans = [plan(number, rows) for number in range(500)]
    emissions = [Emission(row, 0, (1,)) for row in range(rows)]
    times = []
    for _ in range(10):
        for each in plans:
            begin = time.perf_counter()
            recorder.stepped(each, 0.0, 1.0, emissions, STATS)
            times.append(time.perf_counter() - begin)
    print(f"{rows} rows: {1e6 * statistics.median(times):.1f} us a step")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
