"""What Ray runs on a machine: an actor that has one replica as its child, and is not in its way."""

from __future__ import annotations

import asyncio
import signal
import socket
from asyncio.subprocess import Process
from typing import NamedTuple

from ruvon.engine.resources import cores
from ruvon.router.processes import child

MOST_LINES = 10_000  # of a log that nobody has fetched


class Spot(NamedTuple):
    """What a machine has for a replica."""

    host: str
    port: int
    cores: tuple[int, ...]  # by the first CPU of each


class ReplicaActor:
    """Its child ends with it: `ruvon.router.worker` sees its stdin close."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._lines: asyncio.Queue[str] = asyncio.Queue(MOST_LINES)

    async def look(self) -> Spot:
        """What is here, and a port that is free."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.create_server((host, 0)) as probe:
            port = probe.getsockname()[1]
        return Spot(host, port, tuple(cores()))

    async def run(self, told: bytes) -> int:
        """A replica, to its end: its exit code."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()  # of a router that lost sight of it
        async with child(told, {}, self._say) as self._process:
            return await self._process.wait()

    async def send_signal(self, number: int) -> None:
        """To the replica, if there still is one."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.Signals(number))

    async def log(self) -> list[str]:
        """Lines of the replica's log that have come since, once there are some."""
        lines = [await self._lines.get()]
        while not self._lines.empty():
            lines.append(self._lines.get_nowait())
        return lines

    def _say(self, line: str) -> None:
        if self._lines.full():
            self._lines.get_nowait()
        self._lines.put_nowait(line)
