"""Does the event loop stay free? /health while 32 streams run.

python bench/loop.py [--streams 32] [-- SERVE OPTIONS]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time

from measure import Target, machine, write
from process import free_port, running

from ruvon.bench import find_model, open_session

PAUSE = 0.02  # seconds between two probes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("options", nargs="*", help="Passed on to ruvon serve, after --.")
    args = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "ruvon", "serve", "--port", str(port)]
    with running([*command, "--log-level", "warning", *args.options], port) as server:
        quiet, busy = asyncio.run(run(server.url, args.streams))
    numbers = {"streams": args.streams, "idle": spread(quiet), "busy": spread(busy)}
    print(f"/health, ms        p50     p99     max   ({len(busy)} probes)")
    for name in ("idle", "busy"):
        print(f"{name:<14}" + "".join(f"{value:8.2f}" for value in numbers[name].values()))
    print(f"\nWrote {write('loop', {'machine': machine(), 'numbers': numbers})}")


async def run(url: str, streams: int) -> tuple[list[float], list[float]]:
    """Milliseconds of every probe: before, and while the streams run."""
    async with open_session() as session, open_session() as prober:
        target = Target(session, url, await find_model(session, url))
        await target.run(2, 32, 16, 2)
        quiet: list[float] = []
        busy: list[float] = []
        await probe(prober, url, quiet, asyncio.create_task(asyncio.sleep(2)))
        load = asyncio.create_task(target.run(streams, 128, 256, streams))
        await probe(prober, url, busy, load)
    return quiet, busy


async def probe(session, url: str, times: list[float], until: asyncio.Task) -> None:
    while not until.done():
        started = time.perf_counter()
        async with session.get(url + "/health") as response:
            await response.read()
        times.append((time.perf_counter() - started) * 1e3)
        await asyncio.sleep(PAUSE)
    await until


def spread(times: list[float]) -> dict[str, float]:
    points = statistics.quantiles(times, n=100, method="inclusive")
    return {"p50": points[49], "p99": points[98], "max": max(times)}


if __name__ == "__main__":
    main()
