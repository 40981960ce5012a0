"""How late the event loop's thread comes to what is due: what holds it up holds up every stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from ruvon.server.state import STATE

EVERY = 0.1  # seconds


async def watch_lag(app: web.Application) -> AsyncIterator[None]:
    """A ``cleanup_ctx``: while the application runs, look at it every now and then."""
    task = asyncio.create_task(_watch(app[STATE].http.record_lag), name="loop-lag")
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _watch(record: Callable[[float], None]) -> None:
    while True:
        due = time.monotonic() + EVERY
        await asyncio.sleep(EVERY)
        record(max(time.monotonic() - due, 0.0))
