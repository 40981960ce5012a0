"""Whether a server stays as it was: the same load for an hour, and its numbers for each minute.

    python bench/soak.py [--minutes 60] [--clients 6] [--pause 0] [-- SERVE OPTIONS]

Clients stream answers to random prompts of random lengths, one behind the other or with a pause in
between, and every tenth leaves amid its answer. The exit code is 1 where the last third is worse
than the first: more memory, descriptors or threads, or slower than neighbours on the machine
explain.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
from measure import machine, write
from process import TICKS, Neighbours, Server, family, free_port, memory, running, stat_fields

from ruvon.bench import Load, Sample, find_model, open_session, random_prompt, send

MINUTE = 60.0
CACHE = ("--kv-cache-memory", "64MiB")  # is full, and so in memory, after the first minute
PROMPT, ANSWER = 200, 80  # tokens at most
LEAVES = 0.1  # of clients leave amid their answer
MORE_MEMORY = 1.03  # times, from the first third to the last
MORE_TIME = 1.25
HEAD = (
    "| minute | requests | tokens/s | first token p50 ms | p99 ms | between p50 ms | p99 ms "
    "| memory MB | files | threads | others |\n|" + "---:|" * 11
)


@dataclass(slots=True)
class Minute:
    """What was seen in one minute; times in milliseconds, memory in MB."""

    requests: int
    tokens: float
    first: float
    first_p99: float
    between: float
    between_p99: float
    memory: float
    files: int
    threads: int
    others: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--pause", type=float, default=0.0, help="Seconds, on average.")
    parser.add_argument("options", nargs="*", help="Passed on to ruvon serve, after --.")
    args = parser.parse_args()
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "ruvon",
        "serve",
        "--port",
        str(port),
        "--log-level",
        "warning",
    ]
    with running([*command, *CACHE, *args.options], port) as server:
        minutes = asyncio.run(soak(server, args.minutes, args.clients, args.pause))
    verdicts = compare(minutes)
    rows = [asdict(minute) for minute in minutes]
    asked = {"clients": args.clients, "pause": args.pause, "options": args.options}
    path = write("soak", {"machine": machine(), **asked, "minutes": rows})
    print("\n".join(["", *verdicts, f"Wrote {path}"]))
    return 1 if any(verdict.startswith("WORSE") for verdict in verdicts) else 0


async def soak(server: Server, minutes: int, clients: int, pause: float) -> list[Minute]:
    """Load it, and print a row a minute."""
    seen: list[Minute] = []
    samples: list[Sample] = []
    async with open_session() as session:
        model = await find_model(session, server.url)
        tasks = [
            asyncio.create_task(client(session, server.url, model, number, pause, samples))
            for number in range(clients)
        ]
        print(HEAD, flush=True)
        for _ in range(minutes):
            neighbours, worked = Neighbours(), ticks(server.pid)
            began = time.perf_counter()
            done, _ = await asyncio.wait(tasks, timeout=MINUTE, return_when="FIRST_COMPLETED")
            for task in done:
                task.result()  # it has failed
            seconds = time.perf_counter() - began
            own = (ticks(server.pid) - worked) / (TICKS * seconds * (os.cpu_count() or 1))
            seen.append(sum_up(samples, seconds, server.pid, neighbours.share() - own))
            print(row(len(seen), seen[-1]), flush=True)
            samples.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return seen


async def client(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    number: int,
    pause: float,
    samples: list[Sample],
) -> None:
    """Ask, read and ask again. Raises RuntimeError for an answer that is none."""
    rng = random.Random(number)
    while True:
        await asyncio.sleep(rng.uniform(0, 2 * pause))
        prompt = random_prompt(rng, rng.randint(1, PROMPT))
        payload = Load(model, ()).payload(prompt, rng.randint(4, ANSWER))
        asking = asyncio.create_task(send(session, f"{url}/v1/completions", payload))
        if rng.random() < LEAVES:
            await asyncio.sleep(rng.random())
            asking.cancel()
            with suppress(asyncio.CancelledError):
                await asking
            continue
        sample = await asking
        if sample.error:
            raise RuntimeError(sample.error)
        samples.append(sample)


def sum_up(samples: Sequence[Sample], seconds: float, pid: int, others: float) -> Minute:
    firsts = [1e3 * sample.ttft for sample in samples]
    gaps = [1e3 * gap for sample in samples for gap in sample.gaps]
    return Minute(
        requests=len(samples),
        tokens=sum(sample.num_output for sample in samples) / seconds,
        first=quantile(firsts, 0.5),
        first_p99=quantile(firsts, 0.99),
        between=quantile(gaps, 0.5),
        between_p99=quantile(gaps, 0.99),
        memory=memory(pid, "VmRSS") / 1e6,
        files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=len(list(Path(f"/proc/{pid}/task").iterdir())),
        others=others,
    )


def ticks(pid: int) -> int:
    """What a server and its children have worked."""
    fields = (stat_fields(Path(f"/proc/{one}/stat")) for one in family(pid))
    return sum(int(each[11]) + int(each[12]) for each in fields)


def quantile(values: Sequence[float], share: float) -> float:
    """Not a number in a minute in which nothing was answered."""
    return sorted(values)[int(share * (len(values) - 1))] if values else math.nan


def row(number: int, minute: Minute) -> str:
    m = minute
    return (
        f"| {number} | {m.requests} | {m.tokens:.0f} | {m.first:.0f} | {m.first_p99:.0f} "
        f"| {m.between:.1f} | {m.between_p99:.0f} | {m.memory:.1f} | {m.files} | {m.threads} "
        f"| {m.others:.0%} |"
    )


def compare(minutes: Sequence[Minute]) -> list[str]:
    """The last third against the first, but for the first minute, in which caches fill. What takes
    longer counts as worse only if others have not had more of the machine."""
    third = max(len(minutes) // 3, 1)
    first, last = minutes[1 : third + 1] or minutes, minutes[-third:]
    busier = middle(last, "others") > middle(first, "others") + 0.05
    bounds: dict[str, Any] = {
        "memory": MORE_MEMORY,
        "files": 1.2,
        "threads": 1.0,
        "first": MORE_TIME,
        "between": MORE_TIME,
    }
    told = []
    for name, bound in bounds.items():
        before, after = middle(first, name), middle(last, name)
        excused = busier and bound == MORE_TIME
        worse = after > bound * before and not excused
        told.append(f"{'WORSE' if worse else 'flat'}: {name} {before:.1f} → {after:.1f}")
    return told


def middle(minutes: Sequence[Minute], name: str) -> float:
    return statistics.median(getattr(minute, name) for minute in minutes)


if __name__ == "__main__":
    sys.exit(main())
