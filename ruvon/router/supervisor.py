"""Replicas that a router starts itself: watched, started again, and restarted one after another.

Where their processes run is their site's matter: beside this one (`processes`), or where Ray puts
them (`cluster`).
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from ruvon.errors import LoadError
from ruvon.router.fleet import Fleet
from ruvon.router.replica import Replica

log = structlog.get_logger(__name__)

LEAST_WAIT, MOST_WAIT = 0.5, 30.0  # seconds before a replica that ended is started again
STEADY = 60.0  # seconds that a replica has to live for its next end to count as a first one
LAST_WORDS = 15.0  # seconds beyond ``shutdown_timeout`` before a replica that drains is killed
START_TIMEOUT = 1800.0  # seconds until a replica that was rolled must be ready
SETTLED = 0.02  # seconds between two looks at whether a replica has answered all


class Running(Protocol):
    """A replica's process."""

    async def wait(self) -> int:
        """Its exit code, once it has ended. Raises ConnectionError when it is lost from sight."""

    def send_signal(self, number: signal.Signals, /) -> None:
        """Raises ProcessLookupError when it has ended."""


class Site(Protocol):
    """Where a replica's processes run, one after another."""

    def start(self, replica: Replica) -> AbstractAsyncContextManager[Running]:
        """A process, which ends with the block at the latest. Raises ConnectionError."""

    async def close(self) -> None:
        """No process will be wanted there any more."""


@dataclass(slots=True, eq=False)
class Slot:
    """One replica, its site, and the process that is there now."""

    replica: Replica
    site: Site
    is_first: bool = True  # of those without which there is nothing to serve
    process: Running | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    was_ready: bool = False  # ever
    rolled: bool = False  # ended because it was told to, and to be started again
    before: str | None = None  # why the process before this one is gone
    leaving: bool = False  # and not to be started again


class Supervisor:
    """All of them. ``counted`` is told of every restart: which replica, and why."""

    def __init__(self, fleet: Fleet, counted: Callable[[str, str], None], patience: float) -> None:
        """``patience``: seconds that a replica gets to answer what it has."""
        self.slots: list[Slot] = []
        self._fleet = fleet
        self._counted = counted
        self._patience = patience
        self._ending = False
        self._group: asyncio.TaskGroup | None = None
        self._rolling: asyncio.Task[None] | None = None

    def add(self, url: str, site: Site) -> None:
        """One more replica, which runs as long as the supervisor does, or until `retire`."""
        slot = Slot(self._fleet.add(url), site, is_first=self._group is None)
        self.slots.append(slot)
        if self._group is not None:
            self._group.create_task(self._keep(slot))

    async def run(self) -> None:
        """Keep all of them running. Raises LoadError when one of the first ends before it was ever
        ready: it never will be."""
        async with asyncio.TaskGroup() as self._group:
            for slot in self.slots:
                self._group.create_task(self._keep(slot))

    async def stop(self) -> None:
        """Let all drain, and wait until they are gone."""
        self._ending = True
        if self._rolling is not None:
            self._rolling.cancel()
        await asyncio.gather(*(self._end(slot) for slot in self.slots))
        await self._close(self.slots)

    def note(self, replica: Replica) -> None:
        """A poll has found a replica's status changed."""
        for slot in self.slots:
            if slot.replica is replica and replica.status == "ready":
                slot.was_ready = True
                slot.ready.set()
            elif slot.replica is replica and replica.status == "dead":
                log.error("replica_dead", name=replica.name)
                self._signal(slot, signal.SIGKILL)

    async def retire(self, slot: Slot) -> None:
        """Let a replica answer what it has, and take it out for good."""
        log.info("replica_leaves", name=slot.replica.name, in_flight=slot.replica.in_flight)
        slot.leaving = slot.replica.held_back = True
        await self._settle(slot.replica)
        await self._end(slot)
        self.slots.remove(slot)
        self._fleet.remove(slot.replica)
        await self._close([slot])

    async def _close(self, slots: Iterable[Slot]) -> None:
        await asyncio.gather(*(slot.site.close() for slot in slots))

    # ---------------------------------------------------------------- one process

    async def _keep(self, slot: Slot) -> None:
        wait = LEAST_WAIT
        while True:
            began = time.monotonic()
            code = await self._run(slot)
            if self._ending or slot.leaving:
                return
            is_hopeless = slot.is_first and not slot.was_ready and isinstance(code, int)
            if is_hopeless:  # by itself, not because its machine was lost
                raise LoadError(f"replica {slot.replica.name} ended with {code}; its log says why")
            slot.before = "rolled" if slot.rolled else "ended"
            if slot.rolled:
                slot.rolled, wait = False, LEAST_WAIT
                continue
            wait = LEAST_WAIT if time.monotonic() - began > STEADY else min(2 * wait, MOST_WAIT)
            log.error("replica_ended", name=slot.replica.name, code=code, again_in=wait)
            await asyncio.sleep(wait)
            if self._ending or slot.leaving:
                return

    async def _run(self, slot: Slot) -> int | str:
        """Start a process, and be there until it has ended: its exit code, or how it was lost."""
        try:
            async with slot.site.start(slot.replica) as process:
                slot.process = process
                if slot.before is not None:
                    self._counted(slot.replica.name, slot.before)
                return await process.wait()
        except ConnectionError as error:
            return str(error)
        finally:
            slot.ready.clear()
            slot.process = None
            slot.replica.lose()

    def _signal(self, slot: Slot, number: signal.Signals) -> None:
        if slot.process is not None:
            with suppress(ProcessLookupError):
                slot.process.send_signal(number)

    async def _end(self, slot: Slot) -> None:
        """Ask it to drain, and insist after a while."""
        process = slot.process
        if process is None:
            return
        self._signal(slot, signal.SIGTERM)
        with suppress(ConnectionError):
            try:
                async with asyncio.timeout(self._patience + LAST_WORDS):
                    await process.wait()
            except TimeoutError:
                log.warning("replica_killed", name=slot.replica.name)
                self._signal(slot, signal.SIGKILL)
                await process.wait()

    async def _settle(self, replica: Replica) -> None:
        """Wait until it has answered what it has, as long as there is patience."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                while replica.in_flight:  # noqa: ASYNC110 - seldom, and not for long
                    await asyncio.sleep(SETTLED)

    # ---------------------------------------------------------------- one after another

    def restart(self) -> bool:
        """Begin to restart all of them in turn; False if that is under way."""
        if self._rolling is not None and not self._rolling.done():
            return False
        self._rolling = asyncio.create_task(self._roll())
        return True

    async def _roll(self) -> None:
        log.info("rolling_restart", replicas=len(self.slots))
        for slot in list(self.slots):
            try:
                await self._roll_one(slot)
            except TimeoutError:
                log.error("rolling_restart_failed", name=slot.replica.name, why="it is not ready")
                return
        log.info("rolling_restart_done", replicas=len(self.slots))

    async def _roll_one(self, slot: Slot) -> None:
        """Nothing new goes there; what it has is answered; it ends and is started again. Raises
        TimeoutError if it is not ready in time."""
        if slot.process is None or slot.leaving:
            return
        slot.replica.held_back = True
        try:
            await self._settle(slot.replica)
            slot.rolled = True
            slot.ready.clear()
            await self._end(slot)
            async with asyncio.timeout(START_TIMEOUT):
                await slot.ready.wait()
        finally:
            slot.replica.held_back = slot.leaving
