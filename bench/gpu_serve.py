"""`bench/gpu.py` over HTTP: streams of /v1/completions, from clients in other processes."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import random
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from process import Server, free_port, running

from ruvon.bench import Load, Sample, find_model, open_session, run_load

ROOT = Path(__file__).resolve().parent.parent

VLLM_SERVE = {  # concurrency → output tok/s, TTFT p50 and p99, inter-token p50 and p99, ms
    1: (408, 11.8, 21, 2.40, 3.07),
    32: (8164, 100, 169, 3.00, 3.51),
    256: (12300, 355, 1970, 18.6, 19.8),
}


def measure_serve(
    name: str, folder: Path, options: list[str], trees: Sequence[Path]
) -> dict[str, Any]:
    """Servers of several checkouts are up at once and take turns: hosts differ too much to compare
    numbers from two of them."""
    numbers: dict[str, Any] = {}
    with ExitStack() as stack:
        servers = {}
        for i, tree in enumerate(trees):
            share = ["--gpu-memory-utilization", f"{0.9 * (i + 1) / len(trees):.2f}"]
            server = serving(name, folder, [*share, *options], tree)
            servers[tree] = stack.enter_context(server)
            load_server(servers[tree].url, Client(64, 64))
        print("| concurrency | tok/s | TTFT p50 / p99 ms | inter-token p50 / p99 ms | vLLM |")
        print("|---:|---:|---:|---:|---|")
        for concurrency, rounds in ((1, 16), (32, 24), (256, 8)):
            for tree, server in servers.items():
                row = load_server(server.url, Client(concurrency, concurrency * rounds))
                label = f"{concurrency} {tree}" if len(trees) > 1 else str(concurrency)
                print(f"| {label} | {show(row)} | {VLLM_SERVE[concurrency]} |", flush=True)
                numbers[label] = row
        numbers["ready_s"] = [server.ready_seconds for server in servers.values()]
        check_counters(servers[ROOT].url)
    return numbers


def check_counters(url: str) -> None:
    """Every step was one graph, and nothing was compiled on the way."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    for name in ("graph_misses", "kernel_compilations"):
        (line,) = (line for line in lines if line.startswith(f"ruvon_{name}_total"))
        value = float(line.rsplit(" ", 1)[1])
        print(f"{name}: {value:.0f}")
        assert value == 0, line


def measure_load(name: str, folder: Path, options: list[str]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    with serving(name, folder, options, ROOT) as server:
        print("| requests/s | tok/s | TTFT p50 / p99 ms | inter-token p50 / p99 ms |")
        print("|---:|---:|---:|---:|")
        load_server(server.url, Client(64, 64))
        for rate in (16, 48, 96):
            numbers[str(rate)] = row = load_server(server.url, Client(None, 5 * rate, rate))
            print(f"| {rate} | {show(row)} |", flush=True)
        check_counters(server.url)
    return numbers


def show(row: list[float]) -> str:
    return f"{row[0]:,.0f} | {row[1]:.1f} / {row[2]:.0f} | {row[3]:.2f} / {row[4]:.2f}"


@contextmanager
def serving(name: str, folder: Path, options: list[str], tree: Path) -> Iterator[Server]:
    """A server of the checkout ``tree``."""
    port = free_port()
    command = [sys.executable, "-P", "-m", "ruvon", "serve", str(folder), "--load-format", "dummy"]
    command += ["--port", str(port), "--log-level", "warning", "--no-log-requests"]
    command += ["--no-enable-prefix-caching", *options]
    env = {"PYTHONPATH": f"{tree}:{os.environ.get('PYTHONPATH', '')}"}
    with running(command, port, log=folder / f"log-{port}", env=env) as server:
        print(f"{name}: ready after {server.ready_seconds:.1f} s")
        yield server


SECONDS_TO_IMPORT = 5.0


@dataclass(frozen=True, slots=True)
class Client:
    """What all client processes do together."""

    concurrency: int | None
    num_requests: int
    rate: float = math.inf  # requests a second; finite: of mixed lengths, and drawn
    start: float = 0.0  # when to begin, all at once, by `time.perf_counter`

    def share(self, num_clients: int) -> Client:
        each = self.concurrency and self.concurrency // num_clients
        num, rate = self.num_requests // num_clients, self.rate / num_clients
        return Client(each, num, rate, time.perf_counter() + SECONDS_TO_IMPORT)

    def requests(self, rng: random.Random) -> list[Any]:
        mixed = math.isfinite(self.rate)
        lengths = [mixed_lengths(rng) if mixed else (128, 128) for _ in range(self.num_requests)]
        return [([rng.randrange(49000) for _ in range(n)], out) for n, out in lengths]

    def sampling(self) -> dict[str, float]:
        drawn = math.isfinite(self.rate)
        return {"temperature": 0.8, "top_p": 0.95} if drawn else {"temperature": 0.0}


def mixed_lengths(rng: random.Random) -> tuple[int, int]:
    """Of a prompt and its output, which together fit GPT-2's context."""
    prompt = rng.randint(16, 900)
    return prompt, rng.randint(16, min(500, 1024 - prompt))


def load_server(url: str, client: Client) -> list[float]:
    """Output tokens a second, and in ms TTFT p50 and p99, inter-token p50 and p99."""
    num_clients = min(8, client.concurrency or 8)
    with multiprocessing.get_context("spawn").Pool(num_clients) as pool:
        share = client.share(num_clients)
        arguments = [(url, share, i) for i in range(num_clients)]
        samples = [s for part in pool.starmap(run_client, arguments) for s in part]
    errors = [s.error for s in samples if s.error]
    assert not errors, errors[:3]
    seconds = max(s.ended for s in samples) - min(s.started for s in samples)
    ttfts = [s.ttft * 1e3 for s in samples]
    gaps = [gap * 1e3 for s in samples for gap in s.gaps]
    latencies = [float(np.percentile(v, q)) for v in (ttfts, gaps) for q in (50, 99)]
    return [sum(s.num_output for s in samples) / seconds, *latencies]


def run_client(url: str, client: Client, seed: int) -> list[Sample]:
    """One process of the load. `time.perf_counter` is the same clock in all of a machine's."""
    requests = client.requests(random.Random(f"{seed} {time.time_ns()}"))

    async def run() -> list[Sample]:
        async with open_session() as session:
            model = await find_model(session, url)
            await asyncio.sleep(max(0.0, client.start - time.perf_counter()))
            load = Load(
                model,
                requests,
                rate=client.rate,
                max_concurrency=client.concurrency,
                sampling=client.sampling(),
                seed=seed,
            )
            return (await run_load(session, url, load))[0]

    return asyncio.run(run())
