"""What is measured of a server, always the same way; bench/serve.py and bench/peers.py use it.

Prompts are random words, new ones every time, so that no prefix cache can help. Output is greedy
and runs to its full length. Everything streams over HTTP.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
from hardware import cpu_name
from process import Server

import ruvon
from ruvon.bench import Backend, Load, Sample, random_requests, run_load
from ruvon.bench.result import summarize

CONCURRENCIES = (1, 4, 16, 32)
MIXED = 16  # streams of the mixed load, beside its long prompts
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Target:
    """A server and a source of fresh prompts for it."""

    session: aiohttp.ClientSession
    url: str
    model: str
    backend: Backend = "openai"
    ignore_eos: bool = True  # off for servers that refuse the field: their answers may end early
    seeds: Any = field(default_factory=lambda: count(time.time_ns()))

    def load(self, num: int, input_len: int, output_len: int, concurrency: int) -> Load:
        return Load(
            self.model,
            random_requests(random.Random(next(self.seeds)), num, input_len, output_len),
            backend=self.backend,
            max_concurrency=concurrency,
            ignore_eos=self.ignore_eos,
        )

    async def run(
        self, num: int, input_len: int, output_len: int, concurrency: int = 1
    ) -> tuple[list[Sample], float]:
        load = self.load(num, input_len, output_len, concurrency)
        samples, duration = await run_load(self.session, self.url, load)
        for sample in samples:
            if sample.error:
                raise RuntimeError(f"{self.url}: {sample.error}")
        return samples, duration


async def decode_rate(target: Target, repeats: int = 5) -> float:
    """Output tokens per second of one stream after its first token (32 prompt, 128 new tokens)."""
    samples, _ = await target.run(repeats, 32, 128)
    rates = [
        (sample.num_output - 1) / (sample.arrivals[-1] - sample.arrivals[0]) for sample in samples
    ]
    return statistics.median(rates)


async def first_token(target: Target, repeats: int = 5) -> float:
    """Milliseconds to the first token of a 512-token prompt, alone."""
    samples, _ = await target.run(repeats, 512, 2)
    return statistics.median(sample.ttft for sample in samples) * 1e3


async def throughput(target: Target, concurrency: int, rounds: int = 2) -> dict[str, Any]:
    """A closed loop at one concurrency: 128 prompt and 128 new tokens a request."""
    samples, duration = await target.run(max(rounds * concurrency, 4), 128, 128, concurrency)
    return summarize(samples, duration)


async def mixed_load(target: Target, context: int = 2560, seconds: float = 10.0) -> float:
    """99th percentile of the milliseconds between tokens of 16 running streams, while a prompt of
    2,000 tokens arrives every second, or of what the context has room for."""
    longest = min(2000, context - 64)  # random words are a token each, but for a few
    stop = time.perf_counter() + seconds
    gaps: list[float] = []

    async def chatter() -> None:
        while time.perf_counter() < stop:
            samples, _ = await target.run(1, 64, 256)
            gaps.extend(samples[0].gaps)

    async with asyncio.TaskGroup() as group:
        for _ in range(MIXED):
            group.create_task(chatter())
        while time.perf_counter() < stop:
            await asyncio.sleep(1.0)
            group.create_task(target.run(1, longest, 8))
    return float(statistics.quantiles(gaps, n=100, method="inclusive")[98]) * 1e3


async def measure(target: Target, concurrencies: tuple[int, ...]) -> dict[str, Any]:
    """Every number of a running server, by the names the tables use."""
    await target.run(2, 32, 16, 2)  # warm-up
    rate = await decode_rate(target)
    result = {"itl_ms": 1e3 / rate, "decode_tok_s": rate, "ttft_512_ms": await first_token(target)}
    for concurrency in concurrencies:
        numbers = await throughput(target, concurrency)
        result[f"output_tok_s_{concurrency}"] = numbers["output_throughput"]
        result[f"ttft_ms_{concurrency}"] = numbers["median_ttft_ms"]
        result[f"itl_p99_ms_{concurrency}"] = numbers["p99_itl_ms"]
    return result


async def measure_server(
    server: Server,
    target: Target,
    concurrencies: tuple[int, ...],
    context: int = 2560,
    slots: int = MIXED + 1,
) -> dict[str, Any]:
    """`measure`, mixed load if the server has ``slots`` for it, and what starting it took."""
    numbers = await measure(target, concurrencies)
    if slots > MIXED:
        numbers["mixed_itl_p99_ms"] = await mixed_load(target, context)
    return numbers | {
        "ready_s": server.ready_seconds,
        "ready_memory_mb": server.ready_memory / 1e6,
        "peak_memory_mb": server.peak_memory() / 1e6,
    }


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.now().isoformat(timespec="seconds"),
        "ruvon": ruvon.__version__,
        "commit": commit.stdout.strip(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
    }


def write(name: str, content: Mapping[str, Any]) -> Path:
    """Write a result to bench/results/ and return where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.now():%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
