"""The router under test, over servers of fake models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
from routers import Router, close, open_router
from serving import open_server

from ruvon.config import ServerConfig


@pytest.fixture
async def route() -> AsyncIterator[Callable[..., Awaitable[Router]]]:
    """``router = await route(3, "what all models say", key=..., max_imbalance=...)``."""
    async with AsyncExitStack() as stack:

        async def make(
            count: int = 2,
            script: Any = "Hello",
            *,
            key: str | None = None,
            rate_limit: int | None = None,
            token_limit: int | None = None,
            options: list[dict[str, Any]] | None = None,
            **fields: Any,
        ) -> Router:
            server = ServerConfig(
                port=0, api_key=(key,) if key else (), admin_key=("root",) if key else ()
            )
            door = replace(server, rate_limit_requests=rate_limit, rate_limit_tokens=token_limit)
            secret = None if token_limit is None else b"of this fleet"
            replicas = []
            for number in range(count):
                own = options[number] if options else {}
                replica = await open_server(
                    script, **{"server": server, "fleet_secret": secret, **own}
                )
                stack.push_async_callback(close, replica)
                replicas.append(replica)
            router = await open_router(replicas, door, secret, **fields)
            stack.push_async_callback(router.stack.aclose)
            return router

        yield make
