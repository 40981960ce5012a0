"""A router's life: over replicas that are there, or over those that it starts itself."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from secrets import token_bytes

import structlog
import uvloop
from aiohttp import web

from ruvon.config import EngineConfig, RouterConfig, ServerConfig
from ruvon.errors import RuvonError
from ruvon.router.app import ROUTING, Routing, create_router
from ruvon.router.cluster import Cluster, connected
from ruvon.router.fleet import FLEET, Fleet
from ruvon.router.metrics import METRICS
from ruvon.router.places import places
from ruvon.router.processes import HereSite, settings_of
from ruvon.router.replica import parse_url
from ruvon.router.scale import follow_load
from ruvon.router.supervisor import Site, Supervisor
from ruvon.server import console
from ruvon.server.connection import Runner
from ruvon.server.garbage import keep_for_good
from ruvon.server.listen import allow_files, listen, listen_unix
from ruvon.server.signals import watch_end, watch_hangup
from ruvon.server.tls import TLS, Certificate
from ruvon.telemetry.logs import configure_logging

log = structlog.get_logger(__name__)

GOODBYE = 5.0  # seconds for last bytes to reach slow readers
SETTLED = 0.02  # seconds between two looks at whether all is answered
FILES = 64  # beside connections, of which each client's may have another one to a replica


def route(urls: Iterable[str], server: ServerConfig, config: RouterConfig) -> None:
    """Share requests out among the replicas at ``urls``, until a signal. Raises ConfigError."""
    known = list(dict.fromkeys(urls))
    for url in known:
        parse_url(url)
    fleet = Fleet(config, known)
    start(create_router(fleet, Routing(server)))


def serve_replicas(engine: EngineConfig, server: ServerConfig, config: RouterConfig) -> None:
    """Start replicas on this machine, and share requests out among them until a signal. Raises
    ConfigError, and LoadError when they cannot start."""
    where = places(engine, config.data_parallel_size)
    with tempfile.TemporaryDirectory(prefix="ruvon-") as folder:  # 0700
        app, supervisor = create_own(server, config)
        shown, secret = console.is_watched(server), app[ROUTING].secret
        for number, place in enumerate(where):
            path = Path(folder) / f"{number}.sock"
            told = settings_of(engine, server, place, shown, secret, uds=str(path))
            env = {"CUDA_VISIBLE_DEVICES": ",".join(place.devices)} if place.devices else {}
            supervisor.add(f"unix:{path}", HereSite(told, env))
        start(app, supervisor)


def serve_on_ray(engine: EngineConfig, server: ServerConfig, config: RouterConfig) -> None:
    """The same with replicas that Ray places, as many as the load wants."""
    configure_logging(server.log_level, server.log_format)
    app, supervisor = create_own(server, config)
    shown, secret = console.is_watched(server), app[ROUTING].secret
    settings = partial(settings_of, server=server, console=shown, secret=secret)
    with connected(config) as ray:
        cluster = Cluster(ray, engine, settings)
        for _ in range(config.data_parallel_size):
            supervisor.add("", cluster.site())
        start(app, supervisor, cluster.site)


def create_own(server: ServerConfig, config: RouterConfig) -> tuple[web.Application, Supervisor]:
    """A router over replicas of its own, and what will keep them."""
    secret = None if server.rate_limit_tokens is None else token_bytes(32)
    fleet, routing = Fleet(config), Routing(server, secret=secret)
    app = create_router(fleet, routing)
    supervisor = Supervisor(fleet, app[METRICS].record_restart, server.shutdown_timeout)
    routing.restart, routing.changed = supervisor.restart, supervisor.note
    return app, supervisor


def start(
    app: web.Application,
    supervisor: Supervisor | None = None,
    make_site: Callable[[], Site] | None = None,
) -> None:
    """Run until the end; ``make_site`` is where a replica more can run, if there may be more than
    at first. Raises what ended it."""
    server = app[ROUTING].server
    configure_logging(server.log_level, server.log_format)
    allow_files(2 * server.max_connections + FILES)
    keep_for_good()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run(app, supervisor, make_site))


async def run(
    app: web.Application,
    supervisor: Supervisor | None,
    make_site: Callable[[], Site] | None = None,
) -> None:
    """Listen, wait for the end, leave in order."""
    routing, fleet = app[ROUTING], app[FLEET]
    counted = app[METRICS].count_connections
    runner = Runner(app, routing.server, counted, shutdown_timeout=GOODBYE)
    await runner.setup()
    keeping = []
    if supervisor is not None:
        keeping.append(asyncio.create_task(keep(supervisor, routing)))
    if supervisor is not None and make_site is not None:
        keeping.append(asyncio.create_task(follow_load(supervisor, fleet, make_site)))
    try:
        watch_signals(routing, fleet)
        await tell_address(runner, routing.server, app[TLS], len(fleet.replicas))
        await routing.ended.wait()
        await drain(fleet, routing.server.shutdown_timeout)
        if supervisor is not None:
            await supervisor.stop()
    finally:
        for task in keeping:
            task.cancel()
        await asyncio.gather(*keeping, return_exceptions=True)
        await runner.cleanup()
    if routing.failure is not None:
        raise routing.failure


async def keep(supervisor: Supervisor, routing: Routing) -> None:
    """Keep the replicas running; where that is in vain, it is the end."""
    try:
        await supervisor.run()
    except* RuvonError as errors:
        routing.failure = errors.exceptions[0]
        routing.ended.set()


async def tell_address(
    runner: web.AppRunner, server: ServerConfig, certificate: Certificate | None, count: int
) -> None:
    """Listen, and say where."""
    if server.uds is not None:
        await listen_unix(runner, server.uds)
        log.info("listening", url=f"unix:{server.uds}", replicas=count)
        return
    tls = None if certificate is None else certificate.context
    host, port = await listen(runner, server.host, server.port, tls)
    url = f"{server.scheme}://{console.bracketed(host)}:{port}"
    log.info("listening", url=url, port=port, replicas=count)


async def drain(fleet: Fleet, patience: float) -> None:
    """Let requests be answered, and refuse new ones in words until then."""
    fleet.draining = True
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            while fleet.in_flight:  # noqa: ASYNC110 - at the end, once
                await asyncio.sleep(SETTLED)
    log.info("drained", unfinished=fleet.in_flight)


def watch_signals(routing: Routing, fleet: Fleet) -> None:
    """SIGTERM and SIGINT drain and end, SIGHUP restarts the replicas in turn."""

    def drain_all(number: signal.Signals) -> None:
        fleet.draining = True
        routing.ended.set()
        log.info("draining", signal=number.name, unfinished=fleet.in_flight)

    def on_restart() -> None:
        if routing.restart is None or not routing.restart():
            log.warning("no_restart", why="none of ours, or one is under way")

    watch_end(routing.ended.is_set, drain_all, lambda number: os._exit(128 + number))
    watch_hangup(drain_all, on_restart)
