"""The replicas of one machine: started, watched, and restarted one after another.

Each listens on a Unix socket in a folder that only this user may enter.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import structlog

from ruvon.config import EngineConfig, ServerConfig
from ruvon.errors import LoadError
from ruvon.router.fleet import Fleet
from ruvon.router.places import Place
from ruvon.router.replica import Replica

log = structlog.get_logger(__name__)

LEAST_WAIT, MOST_WAIT = 0.5, 30.0  # seconds before a replica that ended is started again
STEADY = 60.0  # seconds that a replica has to live for its next end to count as a first one
LAST_WORDS = 15.0  # seconds beyond ``shutdown_timeout`` before a replica that drains is killed
START_TIMEOUT = 1800.0  # seconds until a replica that was rolled must be ready
LAST_LINES = 1.0  # seconds for the log of a replica that has ended
SETTLED = 0.02  # seconds between two looks at whether a replica has answered all
MOST_LINE = 1 << 20  # bytes of a log line


@dataclasses.dataclass(slots=True, eq=False)
class Slot:
    """One replica's place, and the process that is there now."""

    replica: Replica
    told: bytes  # its settings
    env: Mapping[str, str]
    process: asyncio.subprocess.Process | None = None
    ready: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    was_ready: bool = False  # ever
    rolled: bool = False  # ended because it was told to, and to be started again


class Processes:
    """All of them. ``counted`` is told of every restart: which replica, and why."""

    def __init__(self, fleet: Fleet, counted: Callable[[str, str], None], patience: float) -> None:
        """``patience``: seconds that a replica gets to answer what it has."""
        self.slots: list[Slot] = []
        self._fleet = fleet
        self._counted = counted
        self._patience = patience
        self._ending = False
        self._rolling: asyncio.Task[None] | None = None

    def add(self, replica: Replica, told: bytes, env: Mapping[str, str]) -> None:
        self.slots.append(Slot(replica, told, env))

    async def run(self) -> None:
        """Keep all of them running. Raises LoadError when one ends before it was ever ready: it
        never will be."""
        async with asyncio.TaskGroup() as group:
            for slot in self.slots:
                group.create_task(self._keep(slot))

    async def stop(self) -> None:
        """Let all drain, and wait until they are gone."""
        self._ending = True
        if self._rolling is not None:
            self._rolling.cancel()
        await asyncio.gather(*(self._end(slot) for slot in self.slots))

    def note(self, replica: Replica) -> None:
        """A poll has found a replica's status changed."""
        for slot in self.slots:
            if slot.replica is replica and replica.status == "ready":
                slot.was_ready = True
                slot.ready.set()
            elif slot.replica is replica and replica.status == "dead":
                log.error("replica_dead", name=replica.name)
                self._kill(slot)

    # ---------------------------------------------------------------- one process

    async def _keep(self, slot: Slot) -> None:
        wait = LEAST_WAIT
        while not self._ending:
            began = time.monotonic()
            code = await self._run(slot)
            if self._ending:
                return
            if not slot.was_ready:
                raise LoadError(f"replica {slot.replica.name} ended with {code}; its log says why")
            why = "rolled" if slot.rolled else "ended"
            self._counted(slot.replica.name, why)
            if slot.rolled:
                slot.rolled, wait = False, LEAST_WAIT
                continue
            wait = LEAST_WAIT if time.monotonic() - began > STEADY else min(2 * wait, MOST_WAIT)
            log.error("replica_ended", name=slot.replica.name, code=code, again_in=wait)
            await asyncio.sleep(wait)

    async def _run(self, slot: Slot) -> int:
        """Start a process, and be there until it has ended: its exit code."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "ruvon.router.worker",
            stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, limit=MOST_LINE,
            env={**os.environ, **slot.env}, start_new_session=True,
        )  # fmt: skip
        slot.process = process
        assert process.stdin is not None
        assert process.stderr is not None
        relaying = asyncio.create_task(relay_log(process.stderr, slot.replica.name))
        try:
            with suppress(ConnectionError):
                process.stdin.write(slot.told + b"\n")
                await process.stdin.drain()
            code = await process.wait()
            await asyncio.wait([relaying], timeout=LAST_LINES)
            return code
        finally:
            if process.returncode is None:
                process.kill()
            relaying.cancel()
            slot.ready.clear()
            slot.process = None
            slot.replica.lose()

    def _kill(self, slot: Slot, number: signal.Signals = signal.SIGKILL) -> None:
        if slot.process is not None and slot.process.returncode is None:
            with suppress(ProcessLookupError):
                slot.process.send_signal(number)

    async def _end(self, slot: Slot) -> None:
        """Ask it to drain, and insist after a while."""
        process = slot.process
        if process is None:
            return
        self._kill(slot, signal.SIGTERM)
        try:
            async with asyncio.timeout(self._patience + LAST_WORDS):
                await process.wait()
        except TimeoutError:
            log.warning("replica_killed", name=slot.replica.name)
            self._kill(slot)
            await process.wait()

    # ---------------------------------------------------------------- one after another

    def restart(self) -> bool:
        """Begin to restart all of them in turn; False if that is under way."""
        if self._rolling is not None and not self._rolling.done():
            return False
        self._rolling = asyncio.create_task(self._roll())
        return True

    async def _roll(self) -> None:
        log.info("rolling_restart", replicas=len(self.slots))
        for slot in self.slots:
            try:
                await self._roll_one(slot)
            except TimeoutError:
                log.error("rolling_restart_failed", name=slot.replica.name, why="it is not ready")
                return
        log.info("rolling_restart_done", replicas=len(self.slots))

    async def _roll_one(self, slot: Slot) -> None:
        """Nothing new goes there; what it has is answered; it ends and is started again. Raises
        TimeoutError if it is not ready in time."""
        replica = slot.replica
        if slot.process is None:
            return
        replica.held_back = True
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience):
                    while replica.in_flight:  # noqa: ASYNC110 - seldom, and not for long
                        await asyncio.sleep(SETTLED)
            slot.rolled = True
            slot.ready.clear()
            await self._end(slot)
            async with asyncio.timeout(START_TIMEOUT):
                await slot.ready.wait()
        finally:
            replica.held_back = False


async def relay_log(lines: asyncio.StreamReader, name: str) -> None:
    """Pass a replica's log on to our own, with its name, until it ends."""
    while True:
        try:
            line = await lines.readline()
        except ValueError:  # a line without end
            continue
        if not line:
            return
        sys.stderr.write(named(line.decode(errors="replace"), name))
        sys.stderr.flush()


def named(line: str, name: str) -> str:
    """A line of JSON gets a field, any other a beginning."""
    if line.startswith("{"):
        return f'{{"replica": "{name}", {line[1:]}'
    return f"[{name}] {line}"


def settings_of(
    engine: EngineConfig, server: ServerConfig, place: Place, uds: Path, console: bool
) -> bytes:
    """What a replica is told: the same as this server, but for where it listens and runs."""
    engine = dataclasses.replace(
        engine,
        threads=engine.threads or place.threads,
        cpu_memory_utilization=engine.cpu_memory_utilization * place.share,
    )
    log_format = "console" if console else server.log_format
    told: dict[str, Any] = {
        "cpus": place.cpus,
        "engine": dataclasses.asdict(engine),
        "server": dataclasses.asdict(
            dataclasses.replace(
                server, uds=str(uds), log_format=log_format, tls_cert=None, tls_key=None
            )
        ),
    }
    return orjson.dumps(told)
