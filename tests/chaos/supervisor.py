"""A server as a child process that is started anew whenever it ends, as by systemd, and everything
that can be done to it meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp

READY = 600.0  # seconds that a start may take, on a machine that is busy
ENDS = 300.0  # seconds that an end may take, there too
IN_FLIGHT = "ruvon_router_replica_in_flight"
PROVOKED = {"step_failed", "engine_dead", "stuck", "replica_ended", "replica_dead"}
TROUBLE = ("Traceback", "never retrieved", "was destroyed", "Unclosed", "Segmentation")


@dataclass(slots=True)
class Window:
    """A time in which something happened to a server that its clients may notice."""

    why: str
    began: float
    ended: float = float("inf")
    cuts: bool = True  # answers may break off

    def close(self) -> None:
        self.ended = min(self.ended, time.monotonic())

    def touches(self, began: float, ended: float) -> bool:
        return began <= self.ended and self.began <= ended


@dataclass(frozen=True, slots=True)
class Size:
    """What a process holds."""

    memory: int  # bytes
    files: int  # descriptors but sockets
    sockets: int
    threads: int


class Log:
    """Reads a process's stderr, unless told to pause or to be gone."""

    def __init__(self, pipe: Any) -> None:
        self.trouble: list[str] = []
        self.reading = threading.Event()
        self.reading.set()
        self._pipe = pipe
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._pipe:
            self.reading.wait()
            if self._is_trouble(line):
                self.trouble.append(line.strip()[:2000])

    def _is_trouble(self, line: str) -> bool:
        """An error that nobody has provoked, or what is no line of the log at all."""
        try:
            told = json.loads(line)
        except ValueError:
            return any(word in line for word in TROUBLE)
        return told["level"] in ("error", "critical") and told["event"] not in PROVOKED

    def break_off(self) -> None:
        """As a collector that crashed: whoever writes gets EPIPE."""
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, self._pipe.fileno())
        os.close(nothing)

    def close(self) -> None:
        self.reading.set()
        self._thread.join(5)
        self._pipe.close()


@dataclass
class Supervised:
    """A server at a fixed address."""

    command: Sequence[str]
    port: int
    session: aiohttp.ClientSession
    windows: list[Window] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    starts: int = 0
    process: subprocess.Popen[str] | None = None
    log: Log | None = None
    expected: set[int] = field(default_factory=set)  # exit codes of the end that was asked for
    over: bool = False
    _ready: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def run(self) -> None:
        """Start it, again and again, until `over`."""
        while not self.over:
            self._start()
            assert self.process is not None
            assert self.log is not None
            with suppress(TimeoutError):
                await asyncio.wait_for(self._until_ready(), READY)
            code = await asyncio.to_thread(self.process.wait)
            self._ready.clear()
            self._note_end(code)

    def _start(self) -> None:
        self.starts += 1
        self.process = subprocess.Popen(
            self.command,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=clean_environment(),
        )
        self.log = Log(self.process.stderr)

    async def _until_ready(self) -> None:
        assert self.process is not None
        while self.process.poll() is None:
            with suppress(aiohttp.ClientError, TimeoutError):
                if (await self.ask("/ready"))[0] == 200:
                    for window in self.windows:
                        window.close()
                    self._ready.set()
                    return
            await asyncio.sleep(0.05)

    def _note_end(self, code: int) -> None:
        assert self.log is not None
        self.log.close()
        self.problems += [f"in the log: {line}" for line in self.log.trouble]
        if code not in self.expected:
            self.problems.append(f"{self.command[-1]} ended with {code}")
        self.expected = set()

    async def until_ready(self) -> None:
        await asyncio.wait_for(self._ready.wait(), READY)

    async def ask(self, path: str) -> tuple[int, bytes]:
        """A status and body; of a server that answers now."""
        limit = aiohttp.ClientTimeout(10)
        async with self.session.get(self.url + path, timeout=limit) as reply:
            return reply.status, await reply.read()

    async def held_by_engine(self) -> dict[str, float]:
        """What runs, what waits and which share of the blocks is in use, if any of it is."""
        load = json.loads((await self.ask("/load"))[1])
        names = ("running", "waiting", "kv_cache_usage")
        return {name: load[name] for name in names if load[name]}

    async def held_by_router(self) -> dict[str, float]:
        """Requests that replicas are believed to have, by the line of the metrics."""
        lines = (await self.ask("/metrics"))[1].decode().splitlines()
        told = (line.rpartition(" ") for line in lines if IN_FLIGHT in line and line[0] != "#")
        return {name: float(value) for name, _, value in told if float(value)}

    def size(self) -> Size:
        status = Path(f"/proc/{self.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        memory, threads = int(fields["VmRSS"].split()[0]) << 10, int(fields["Threads"])
        kinds = [kind_of(path) for path in Path(f"/proc/{self.pid}/fd").iterdir()]
        sockets = kinds.count("socket")
        return Size(memory, len(kinds) - sockets, sockets, threads)

    # ---------------------------------------------------------------- what is done to it

    @contextmanager
    def trouble(self, why: str, *, cuts: bool = True) -> Iterator[Window]:
        """What clients may notice of what happens inside, and until it is ready again."""
        self.windows.append(Window(why, time.monotonic(), cuts=cuts))
        yield self.windows[-1]

    async def end(self, number: signal.Signals, *codes: int) -> None:
        """Have it end, with one of these codes, and wait until it is there again."""
        self.expected = set(codes)
        self.forget_ready()
        self.process and self.process.send_signal(number)
        await self.until_ready()

    def forget_ready(self) -> None:
        """It is about to end: ready is what comes then."""
        self._ready.clear()

    async def until_ended(self) -> None:
        """Until this process is over."""
        assert self.process is not None
        await asyncio.to_thread(self.process.wait, ENDS)

    def kill_child(self, rng: Random) -> None:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        os.kill(int(rng.choice(children)), signal.SIGKILL)

    async def stop(self) -> None:
        """For good, in order."""
        self.over = True
        self.expected = {0}
        self._ready.clear()
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            await self.until_ended()
        except subprocess.TimeoutExpired:
            self.problems.append(f"it did not end in {ENDS:g} seconds")
            self.process.kill()

    @asynccontextmanager
    async def few_files(self, spare: int) -> AsyncIterator[None]:
        """Only so many more descriptors than it has."""
        limits = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)
        size = self.size()
        few = size.files + size.sockets + spare
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (few, limits[1]))
        try:
            yield
        finally:
            resource.prlimit(self.pid, resource.RLIMIT_NOFILE, limits)


def kind_of(descriptor: Path) -> str:
    """``socket``, ``pipe``, a path ... ; nothing of one that has just been closed."""
    with suppress(OSError):
        return os.readlink(descriptor).partition(":")[0]
    return ""


def clean_environment() -> dict[str, str]:
    """Without settings of somebody else's server."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RUVON_")}


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]
