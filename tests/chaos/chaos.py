"""200 clients and whatever can happen to a server: ``make chaos``.

    python tests/chaos/chaos.py [--seconds 600] [--seed N] [SCENARIO ...]

At the end of each scenario nothing runs, every block is free, memory and descriptors are where they
were, and every request that no fault has hit has got exactly the answer that it gets alone. The
seed is printed: requests, clients and faults are drawn from it, though not how they meet.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from random import Random

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "server")]

import aiohttp  # noqa: E402 - the lines above find what follows
from crowd import PATIENCE, Odd, Storm  # noqa: E402
from disturbances import World, disturb, folder_of, is_excused  # noqa: E402
from drawn import Case  # noqa: E402
from folding import fold  # noqa: E402
from scenarios import PROGRAM, SCENARIOS, Scenario  # noqa: E402
from supervisor import Size, Supervised  # noqa: E402

CASES_PER_SECOND = 8  # of different requests; each is asked alone first
MOST_CASES = 1500
ALONE = 0.25  # of the time may pass until all have been asked; who has not been by then is left out
QUIET = 30.0  # seconds after which nothing may be left of what clients wanted
MORE_MEMORY, MORE_SHARE = 32 << 20, 0.1  # that a process may have grown by while it was in use
MORE_FILES = 6
LEAST = 40  # requests; and right answers before a server is weighed, and again before its end
SHOWN = 5  # odd answers


@dataclass
class Report:
    """What came of a scenario."""

    name: str
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    done: dict[str, int] = field(default_factory=dict)
    hit: int = 0
    excused: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[str, Size, Size]] = field(default_factory=list)  # when it was new, at the end
    problems: list[str] = field(default_factory=list)


async def play(name: str, scenario: Scenario, seed: str, seconds: float) -> Report:
    """Ask each request alone, then all at once while things happen, then look what is left."""
    report = Report(name)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(PATIENCE)
    with tempfile.TemporaryDirectory() as folder:
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            world = scenario.make(Path(folder), seed, session)
            running = [asyncio.create_task(server.run()) for server in world.all]
            try:
                await play_in(world, scenario, seed, seconds, report)
            finally:
                for server in world.all:
                    await server.stop()
                await asyncio.gather(*running)
    report.problems += [problem for server in world.all for problem in server.problems]
    return report


async def play_in(
    world: World, scenario: Scenario, seed: str, seconds: float, report: Report
) -> None:
    for server in world.all:
        await server.until_ready()
    say(f"{report.name}: ready, asking each request alone")
    began = time.monotonic()
    cases = scenario.cases(seed, min(int(CASES_PER_SECOND * seconds), MOST_CASES))
    session, port = world.front.session, world.front.port
    alone = await ask_each_alone(session, port, cases, began + ALONE * seconds)
    del cases[len(alone) :]
    report.problems += [
        f"alone: {status} for {case.path} {case.body[:300]!r}"
        for case, (status, _) in zip(cases, alone, strict=True)
        if status >= 500
    ]
    storm = Storm(seed, port, session, cases, alone, clients=scenario.clients)
    say(f"{report.name}: {len(cases)} asked, {scenario.clients} clients begin")
    await rage(storm, world, scenario, seconds - (time.monotonic() - began), report)
    say(f"{report.name}: clients are gone, looking what is left")
    report.problems += await left_behind(world)
    report.problems += weigh(report, scenario.clients)
    await ask_again(storm, report)
    settle(storm, world, report)


async def rage(
    storm: Storm, world: World, scenario: Scenario, seconds: float, report: Report
) -> None:
    """All clients; most of the time all disturbances; then a while for memory to settle."""
    clients = [asyncio.create_task(storm.client(number)) for number in range(scenario.clients)]
    set_faults(world, True)
    rng = Random(f"{storm.seed} disturbances")
    until = time.monotonic() + 0.7 * seconds
    disturbing = asyncio.create_task(disturb(world, scenario.disturbances, rng, until))
    done, _ = await asyncio.wait([disturbing, *clients], return_when="FIRST_COMPLETED")
    for task in done:
        task.result()  # a client that has ended has failed
    say(f"{sum(world.counts.values())} disturbances, calm from here on")
    await answered(storm, 0.15 * seconds)
    young = [server.size() for server in world.all]
    await answered(storm, 0.15 * seconds)
    storm.over = True
    await asyncio.gather(*clients)
    set_faults(world, False)
    report.done = world.counts
    report.sizes = [
        (" ".join(server.command[1:3]), size, server.size())
        for server, size in zip(world.all, young, strict=True)
    ]


def say(what: str) -> None:
    """How far it is, for whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


async def answered(storm: Storm, seconds: float) -> None:
    """So many seconds, and on a slow machine until something has been answered."""
    enough = storm.counts["valid", "as alone"] + LEAST
    await asyncio.sleep(seconds)
    while storm.counts["valid", "as alone"] < enough:  # noqa: ASYNC110 - a count
        await asyncio.sleep(0.1)


def set_faults(world: World, on: bool) -> None:
    for server in filter(is_chaotic, world.all):
        path = folder_of(server) / "faults"
        path.touch() if on else path.unlink()


def is_chaotic(server: Supervised) -> bool:
    return str(PROGRAM) in server.command


async def ask_each_alone(
    session: aiohttp.ClientSession, port: int, cases: Sequence[Case], until: float
) -> list[tuple[int, bytes]]:
    alone: list[tuple[int, bytes]] = []
    for case in cases:
        if len(alone) >= LEAST and time.monotonic() > until:
            break
        alone.append(await ask_alone(session, port, case))
    return alone


async def ask_alone(session: aiohttp.ClientSession, port: int, case: Case) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"}
    url = f"http://127.0.0.1:{port}{case.path}"
    async with session.post(url, data=BytesIO(case.body), headers=headers) as reply:
        return reply.status, fold(case.stream and reply.status == 200, await reply.read())


async def ask_again(storm: Storm, report: Report) -> None:
    """Whoever has been through all that must be as good as new."""
    for case, alone in list(zip(storm.cases, storm.alone, strict=True))[::5]:
        if await ask_alone(storm.session, storm.port, case) != alone:
            report.problems.append(f"another answer afterwards: {case.path} {case.body[:500]!r}")


async def left_behind(world: World) -> list[str]:
    """Once all clients are gone: what still runs, waits or holds blocks."""
    problems = []
    for server in world.all:
        held = server.held_by_engine if server in world.workers else server.held_by_router
        deadline = time.monotonic() + QUIET
        while (found := await held()) and time.monotonic() < deadline:  # noqa: ASYNC110 - polled
            await asyncio.sleep(0.1)
        if found:
            problems.append(f"something is left after {QUIET:g} seconds: {found}")
    return problems


def weigh(report: Report, clients: int) -> list[str]:
    """What a process has more of than when it was younger, though no client is there any more. Of
    each a connection may be kept for its next request, and a router's for it."""
    problems = []
    for name, young, old in report.sizes:
        if old.memory > young.memory + max(MORE_MEMORY, MORE_SHARE * young.memory):
            problems.append(f"{name}: memory grew from {young.memory} to {old.memory}")
        if old.files > young.files + MORE_FILES:
            problems.append(f"{name}: {old.files} files, and {young.files} when it was younger")
        if old.sockets > max(young.sockets, 2 * clients):
            problems.append(f"{name}: {old.sockets} sockets, and {young.sockets} then")
        if old.threads > young.threads + 2:
            problems.append(f"{name}: {old.threads} threads, after {young.threads}")
    return problems


def settle(storm: Storm, world: World, report: Report) -> None:
    """Which odd answers are explained, and which are faults of ours."""
    hit = set[str]()
    for server in filter(is_chaotic, world.all):
        hit |= set((folder_of(server) / "hit").read_text().split())
    report.hit, report.counts = len(hit), storm.counts
    unexplained = [odd for odd in storm.odd if not is_excused(odd, world.windows, hit)]
    report.excused = Counter(odd.what for odd in storm.odd)
    report.excused.subtract(Counter(odd.what for odd in unexplained))
    for what, count in Counter(odd.what for odd in unexplained).items():
        report.problems.append(f"{count} answers not explained: {what}")
    shown = {odd.what: odd for odd in reversed(unexplained)}.values()
    few = [*shown, *unexplained[:SHOWN]]
    report.problems += [describe(odd, world) for odd in few]


def describe(odd: Odd, world: World) -> str:
    took = odd.ended - odd.began
    during = [window for window in world.windows if window.touches(odd.began, odd.ended)]
    meanwhile = ", ".join(f"{w.why} {w.began - odd.began:+.2f} s" for w in during) or "nothing"
    return (
        f"{odd.what}, {odd.manner}, {odd.request_id}, {took:.2f} s, of which it sent for "
        f"{odd.sending:.2f}, meanwhile {meanwhile}: {odd.case.path} "
        f"{odd.case.body[:800]!r}\n      got {odd.detail}"
    )


def show(report: Report, scenario: Scenario, seconds: float) -> None:
    """As a person reads it."""
    print(f"\n{report.name}: {scenario.what}, {seconds:.0f} s")
    table: dict[str, list[str]] = {}
    for (kind, outcome), count in sorted(report.counts.items()):
        table.setdefault(kind, []).append(f"{outcome} {count:,}")
    for kind, outcomes in table.items():
        print(f"  {kind:<16} {', '.join(outcomes)}")
    print(
        f"  {'done to it':<16} {', '.join(f'{n} {c}' for n, c in report.done.items()) or 'nothing'}"
    )
    print(f"  {'hit by a fault':<16} {report.hit:,} requests")
    excused = ", ".join(f"{what} {count:,}" for what, count in report.excused.items() if count)
    print(f"  {'excused':<16} {excused or 'nothing'}")
    for name, young, old in report.sizes:
        print(f"  {'size in use':<16} {describe_size(young)}: {name}")
        print(f"  {'at the end':<16} {describe_size(old)}")
    for problem in report.problems:
        print(f"  PROBLEM: {problem}")


def describe_size(size: Size) -> str:
    held = f"{size.files} files, {size.sockets} sockets, {size.threads} threads"
    return f"{size.memory / 1e6:.0f} MB, {held}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scenarios", nargs="*", help=f"Of {', '.join(SCENARIOS)}; all by default.")
    parser.add_argument("--seconds", type=float, default=600.0, help="For all of them together.")
    parser.add_argument("--seed", default=str(time.time_ns() % 1_000_000))
    args = parser.parse_args(arguments)
    chosen = {name: SCENARIOS[name] for name in args.scenarios or SCENARIOS}
    total = sum(scenario.share for scenario in chosen.values())
    print(f"seed {args.seed}: again with --seed {args.seed}", flush=True)
    failed = 0
    for name, scenario in chosen.items():
        seconds = args.seconds * scenario.share / total
        report = asyncio.run(play(name, scenario, args.seed, seconds))
        show(report, scenario, seconds)
        failed += bool(report.problems)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
