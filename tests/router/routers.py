"""A router under test, over servers of fake models, all on real sockets."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from serving import Server

from ruvon.config import RouterConfig, ServerConfig
from ruvon.router.app import Routing, create_router
from ruvon.router.fleet import FLEET, Fleet
from ruvon.router.metrics import METRICS
from ruvon.server.connection import Runner
from ruvon.server.listen import listen


@dataclass
class Router:
    """A running router, its replicas, and a client session to it."""

    app: web.Application
    url: str
    replicas: list[Server]
    session: aiohttp.ClientSession
    stack: AsyncExitStack = field(repr=False)

    @property
    def fleet(self) -> Fleet:
        return self.app[FLEET]

    get = Server.get
    post = Server.post
    chat = Server.chat
    complete = Server.complete
    until = Server.until

    async def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics``, by its name and labels as they are written."""
        text = (await self.get("/metrics")).body.decode()
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    async def lose(self, number: int) -> None:
        """End a replica as a crash does: its connections break, and it takes no more."""
        server = self.replicas[number]
        for connection in list(server.runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        for site in list(server.runner.sites):
            await site.stop()


async def open_router(
    replicas: list[Server], server: ServerConfig, secret: bytes | None = None, **fields: Any
) -> Router:
    fleet = Fleet(RouterConfig(poll_interval=0.05, **fields), [each.url for each in replicas])
    app = create_router(fleet, Routing(server, secret=secret))
    stack = AsyncExitStack()
    runner = Runner(app, server, app[METRICS].count_connections, shutdown_timeout=1)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    _, port = await listen(runner, "127.0.0.1", 0)
    session = await stack.enter_async_context(aiohttp.ClientSession())
    router = Router(app, f"http://127.0.0.1:{port}", replicas, session, stack)
    await router.until(lambda: fleet.num_open == len(replicas))
    return router


async def close(server: Server) -> None:
    """Steps that are driven by hand come to their end, so that nobody waits for them."""
    while server.fake.num_held:
        server.fake.finish_step()
        await asyncio.sleep(0)
    await server.stack.aclose()
