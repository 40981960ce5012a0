"""What the host does for each step besides computing it: schedule, build, commit, deliver.

    python bench/host.py [--batch 1 32 256] [--context 512] [--steps 300] [--windows 0 128]

Steady decoding, one token a sequence and step, over a runner that draws the same token at once. In
microseconds a step (the median) and nanoseconds a sequence.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from concurrent.futures import Future

import torch
from measure import machine, write

from ruvon.config import EngineConfig
from ruvon.engine.batch import BlockTables, lay_out
from ruvon.engine.engine import Engine
from ruvon.engine.loop import EngineLoop
from ruvon.engine.types import Job, Plan, SamplingParams, StepResult
from ruvon.telemetry.metrics import Metrics

BLOCK_SIZE = 16
PARTS = ("schedule", "build", "commit", "deliver")


class Sampler:
    """Samples a 1 for every row. ``build`` is how long it took to build the last plan's batch."""

    depth = grammar_depth = 1
    long_step = 0

    def __init__(self, windows: tuple[int, ...]) -> None:
        self._tables = BlockTables()
        self._windows = windows

    def launch(self, plan: Plan) -> Future[StepResult]:
        began = time.perf_counter_ns()
        self._tables.follow(plan)
        lay_out(plan, self._tables, BLOCK_SIZE, self._windows).to_batch(torch.device("cpu"))
        self.build = time.perf_counter_ns() - began
        future: Future[StepResult] = Future()
        future.set_result(StepResult(((1,),) * len(plan.rows), (None,) * len(plan.rows)))
        self.total = time.perf_counter_ns() - began
        return future


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--context", type=int, default=512, help="Tokens of a prompt.")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--windows", type=int, nargs="+", default=[0], help="Of cache groups.")
    args = parser.parse_args()
    print(f"{'us a step':<12}" + "".join(f"{part:>10}" for part in (*PARTS, "sum")) + "  ns/seq")
    numbers = {}
    for batch in args.batch:
        times = asyncio.run(measure(batch, args.context, args.steps, tuple(args.windows)))
        medians = {part: statistics.median(values) / 1e3 for part, values in times.items()}
        total = sum(medians.values())
        print(f"batch {batch:<6}" + "".join(f"{medians[part]:10.1f}" for part in PARTS), end="")
        print(f"{total:10.1f}{total / batch * 1e3:8.0f}")
        numbers[batch] = medians
    facts = {
        "machine": machine(),
        "context": args.context,
        "windows": args.windows,
        "microseconds": numbers,
    }
    print(f"\nWrote {write('host', facts)}")


async def measure(
    batch: int, context: int, steps: int, windows: tuple[int, ...]
) -> dict[str, list[int]]:
    """Nanoseconds of each part, step by step."""
    config = EngineConfig(
        block_size=BLOCK_SIZE, max_num_seqs=batch, max_num_batched_tokens=max(8192, batch)
    )
    runner = Sampler(windows)
    length = context + steps + 100
    engine = Engine(
        runner, config,
        max_model_len=length, windows=windows, vocab_size=1000,
        num_blocks=len(windows) * batch * (length // BLOCK_SIZE + 2),
    )  # fmt: skip
    loop = EngineLoop(engine, Metrics())
    loop.start()
    await asyncio.sleep(0)
    sampling = SamplingParams(temperature=0, max_tokens=steps + 99)
    jobs = [Job((k % 999 + 1,) * context, sampling) for k in range(batch)]
    streams = [loop.generate([job]) for job in jobs]
    times: dict[str, list[int]] = {part: [] for part in PARTS}
    while len(times["build"]) < steps:
        one = step(engine, loop, runner)
        if engine.stats.num_tokens == batch:  # all prompts are done
            for part, value in zip(PARTS, one, strict=True):
                times[part].append(value)
        for stream in streams:
            stream._news.clear()
    loop._task.cancel()
    return times


def step(engine: Engine, loop: EngineLoop, runner: Sampler) -> tuple[int, int, int, int]:
    began = time.perf_counter_ns()
    pending = engine.launch(began / 1e9)
    launched = time.perf_counter_ns()
    emissions = engine.collect(pending)
    collected = time.perf_counter_ns()
    loop._record_step(pending, collected / 1e9)
    loop._deliver(emissions, collected / 1e9)
    delivered = time.perf_counter_ns()
    schedule = launched - began - runner.total
    return schedule, runner.build, collected - launched, delivered - collected


if __name__ == "__main__":
    main()
