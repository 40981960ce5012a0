"""The server under test, on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from serving import Server, open_server


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[Server]]]:
    """``server = await serve("what the model says")``; see `serving.open_server`."""
    opened: list[Server] = []

    async def make(*args: Any, **options: Any) -> Server:
        opened.append(await open_server(*args, **options))
        return opened[-1]

    yield make
    for server in opened:
        await server.stack.aclose()
