"""What happens to servers while clients ask, and which odd answers that excuses."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeAlias

from crowd import Odd
from supervisor import Supervised, Window

from ruvon.server.connection import HEAD_PATIENCE, LINGER

TRAVELS = 2.0  # seconds that a request may be on its way before a busy server takes it


@dataclass
class World:
    """The servers of a scenario. ``front`` is whom clients ask; ``workers`` compute."""

    folder: Path
    front: Supervised
    workers: Sequence[Supervised]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def all(self) -> list[Supervised]:
        return [self.front, *(worker for worker in self.workers if worker is not self.front)]

    @property
    def windows(self) -> list[Window]:
        return [window for server in self.all for window in server.windows]


Disturbance: TypeAlias = Callable[[World, Random], Awaitable[None]]


async def disturb(
    world: World, disturbances: Sequence[Disturbance], rng: Random, until: float
) -> None:
    """One after the other, in an order of chance, each as often as the others: once at least, and
    again ``until`` then."""
    while disturbances:
        for one in rng.sample(disturbances, len(disturbances)):
            if one.__name__ in world.counts and time.monotonic() > until:
                return
            await asyncio.sleep(rng.uniform(0.3, 1.0))
            await one(world, rng)
            world.counts[one.__name__] = world.counts.get(one.__name__, 0) + 1
    await asyncio.sleep(until - time.monotonic())


async def drain(world: World, rng: Random) -> None:
    """SIGTERM: what has begun is answered, and then it ends well. New ones are refused."""
    server = rng.choice(world.workers)
    with server.trouble("drained", cuts=False):
        await server.end(signal.SIGTERM, 0)


async def kill(world: World, rng: Random) -> None:
    server = rng.choice(world.workers)
    with server.trouble("killed"):
        await server.end(signal.SIGKILL, -signal.SIGKILL)


async def insist(world: World, rng: Random) -> None:
    """A second signal while it drains."""
    server = rng.choice(world.workers)
    with server.trouble("told twice"):
        server.process and server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.02)
        await server.end(signal.SIGTERM, 128 + signal.SIGTERM, 0)


async def lose(world: World, rng: Random) -> None:
    """The device is gone: everybody is told so, and the process ends to be started again."""
    server = rng.choice(world.workers)
    with server.trouble("engine lost"):
        (folder_of(server) / "lose").touch()
        server.expected = {70}
        server.forget_ready()
        await server.until_ended()
        (folder_of(server) / "lose").unlink()
        await server.until_ready()


async def stop_for_a_while(world: World, rng: Random) -> None:
    """As a virtual machine that is moved. Nobody's answer may be another one for it."""
    server = rng.choice(world.all)
    server.process and server.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(rng.uniform(0.3, 1.0))
    server.process and server.process.send_signal(signal.SIGCONT)


async def stuff_log(world: World, rng: Random) -> None:
    """Nobody reads the log for a second, so its pipe is full. Excuses nothing."""
    log = rng.choice(world.all).log
    assert log is not None
    log.reading.clear()
    await asyncio.sleep(1)
    log.reading.set()


async def break_log(world: World, rng: Random) -> None:
    """The log's reader is gone, until the process is started again. Excuses nothing."""
    log = rng.choice(world.all).log
    assert log is not None
    log.break_off()


async def use_up_files(world: World, rng: Random) -> None:
    """For a moment hardly any descriptor is left: connections are closed at once."""
    server = world.front
    with server.trouble("no files") as window:
        async with server.few_files(rng.randrange(3)):
            await asyncio.sleep(0.5)
        window.close()


async def kill_rank(world: World, rng: Random) -> None:
    """One of several processes that compute together."""
    server = world.front
    with server.trouble("rank killed"):
        server.expected = {70}
        server.forget_ready()
        server.kill_child(rng)
        await server.until_ready()


def folder_of(server: Supervised) -> Path:
    """Where a chaotic program looks for what it is to do."""
    return Path(server.command[2])


# ------------------------------------------------------------------------------ excuses


def is_excused(odd: Odd, windows: Sequence[Window], hit: set[str]) -> bool:
    """Whether something has happened that explains an answer. No wrong answer is ever excused."""
    during = [window for window in windows if window.touches(odd.began, odd.ended)]
    match odd.what:
        case "generation_failed":
            return odd.request_id in hit
        case "queue_full" | "unavailable":
            return True
        case "deadline_exceeded":
            return odd.manner == "hurried"
        case "request_timeout":  # on a busy machine a client itself may be late
            return odd.sending > HEAD_PATIENCE
        case "not_ready" | "shutting_down":
            return bool(during)
        case "unanswered":  # what a server that drains had begun, it must answer
            return any(w.cuts or w.began < odd.began + TRAVELS for w in during)
        case "cut" if odd.sending > LINGER:  # refused meanwhile, and has not read that
            return bool(during)
        case "engine_dead" | "replica_lost" | "cut":
            return any(window.cuts for window in during)
        case _:
            return False
