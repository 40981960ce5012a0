"""`ruvon serve` that says every few seconds what its event loop's thread spent its time on.

    python bench/parts.py serve MODEL [options of ruvon serve]

Load it with `ruvon bench serve` or the benchmarks here. A part holds the parts within it. Measuring
costs about a tenth of the speed. One table with 256 streams is in docs/log.md.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from aiohttp.http_writer import StreamWriter

from ruvon.cli import main
from ruvon.engine.engine import Engine
from ruvon.engine.gpu.in_flight import InFlightStep
from ruvon.engine.gpu.inputs import StepInputs
from ruvon.engine.gpu.runner import GpuRunner
from ruvon.engine.loop import EngineLoop
from ruvon.engine.scheduler import Scheduler
from ruvon.server import requests
from ruvon.server.generation import Generation

EVERY = 2.0  # seconds
LEAST_STEPS = 20  # in that time; without, nothing is printed

PARTS: dict[str, tuple[Any, str]] = {
    "launch": (Engine, "launch"),
    "  schedule": (Scheduler, "schedule"),
    "  runner": (GpuRunner, "launch"),
    "    inputs anew": (StepInputs, "_start"),
    "    inputs advanced": (StepInputs, "_advance"),
    "collect": (Engine, "collect"),
    "  read back": (InFlightStep, "_read"),
    "  commit": (Scheduler, "commit"),
    "deliver": (EngineLoop, "_deliver"),
    "read a request's JSON": (requests, "read_fields"),
    "queue a request": (EngineLoop, "generate"),
    "ids to deltas": (Generation, "_push"),
    "deltas to events": (Generation, "_write"),
    "write": (StreamWriter, "_writelines"),
}


class Clock:
    """Calls and seconds of each part since the last table."""

    def __init__(self) -> None:
        self._spent: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])

    def watch(self, name: str, owner: Any, attribute: str) -> None:
        inner: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(inner)
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                spent = self._spent[name]
                spent[0] += 1
                spent[1] += time.perf_counter() - began

        setattr(owner, attribute, timed)

    async def report(self) -> None:
        """A table to stderr, over and over."""
        wall, cpu = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(EVERY)
            wall, cpu, before = time.perf_counter(), time.thread_time(), (wall, cpu)
            if self._spent["collect"][0] >= LEAST_STEPS:
                self._print(wall - before[0], cpu - before[1])
            self._spent.clear()

    def _print(self, wall: float, cpu: float) -> None:
        print(f"{wall:.1f} s, thread busy for {cpu / wall:.0%}", file=sys.stderr)
        for name in PARTS:
            calls, seconds = self._spent[name]
            if calls:
                each = seconds / calls * 1e6
                print(
                    f"{name:22} {seconds / wall:4.0%} {calls:7,} x {each:6.0f} us", file=sys.stderr
                )


def run() -> None:
    clock = Clock()
    for name, (owner, attribute) in PARTS.items():
        clock.watch(name, owner, attribute)
    start = EngineLoop.start

    def start_and_report(loop: EngineLoop) -> None:
        start(loop)
        loop.reporting = asyncio.create_task(clock.report())  # type: ignore[attr-defined]

    EngineLoop.start = start_and_report  # type: ignore[method-assign]
    main()


if __name__ == "__main__":
    run()
