"""Replicas as processes of this machine.

Each listens on a Unix socket in a folder that only this user may enter.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any

import orjson

from ruvon.config import EngineConfig, ServerConfig
from ruvon.router.places import Place
from ruvon.router.replica import Replica

LAST_LINES = 1.0  # seconds for the log of a replica that has ended
MOST_LINE = 1 << 20  # bytes of a log line


@dataclasses.dataclass(frozen=True, slots=True)
class HereSite:
    """A place on this machine. ``told`` are a replica's settings, as `settings_of` writes them."""

    told: bytes
    env: Mapping[str, str]

    def start(self, replica: Replica) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
        return child(self.told, self.env, partial(pass_on, name=replica.name))

    async def close(self) -> None:
        """There is nothing to give back."""


@asynccontextmanager
async def child(
    told: bytes, env: Mapping[str, str], say: Callable[[str], None]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A replica as a child of this process; ``say`` gets the lines of its log."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ruvon.router.worker",
        stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, limit=MOST_LINE,
        env={**os.environ, **env}, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stderr is not None
    relaying = asyncio.create_task(relay_log(process.stderr, say))
    try:
        with suppress(ConnectionError):
            process.stdin.write(told + b"\n")
            await process.stdin.drain()
        yield process
        await asyncio.wait([relaying], timeout=LAST_LINES)
    finally:
        if process.returncode is None:
            process.kill()
        relaying.cancel()


async def relay_log(lines: asyncio.StreamReader, say: Callable[[str], None]) -> None:
    """Pass a replica's log on until it ends."""
    while True:
        try:
            line = await lines.readline()
        except ValueError:  # a line without end
            continue
        if not line:
            return
        say(line.decode(errors="replace"))


def pass_on(line: str, name: str) -> None:
    """Write a replica's line to our own log."""
    sys.stderr.write(named(line, name))
    sys.stderr.flush()


def named(line: str, name: str) -> str:
    """A line of JSON gets a field, any other a beginning."""
    if line.startswith("{"):
        return f'{{"replica": "{name}", {line[1:]}'
    return f"[{name}] {line}"


def settings_of(
    engine: EngineConfig,
    server: ServerConfig,
    place: Place,
    console: bool,
    secret: bytes | None,
    **where: Any,
) -> bytes:
    """What a replica is told: the same as this server, but for where it runs, and for where it
    listens, which is ``uds``, or ``host`` and ``port``. What the router does is not done twice;
    ``secret`` is for what it has to know for that."""
    engine = dataclasses.replace(
        engine,
        threads=engine.threads or place.threads,
        cpu_memory_utilization=engine.cpu_memory_utilization * place.share,
    )
    log_format = "console" if console else server.log_format
    own = {"uds": None, "log_format": log_format, **where}
    own |= dict.fromkeys(("tls_cert", "tls_key", "rate_limit_requests", "rate_limit_tokens"))
    told: dict[str, Any] = {
        "cpus": place.cpus,
        "secret": secret and secret.hex(),
        "engine": dataclasses.asdict(engine),
        "server": dataclasses.asdict(dataclasses.replace(server, **own)),
    }
    return orjson.dumps(told)
