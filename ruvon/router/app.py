"""The router as an application: its routes, and what it answers itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from ruvon.config import ServerConfig, parse_size
from ruvon.errors import RequestError, UnavailableError
from ruvon.router.fleet import FLEET, Fleet, watch
from ruvon.router.forward import READER, Relayed, forward
from ruvon.router.metrics import METRICS, TOTALS, RouterMetrics, Totals, render
from ruvon.router.replica import Replica
from ruvon.server import rate_limits
from ruvon.server.events import CLIENT_LEFT
from ruvon.server.failures import error_answer
from ruvon.server.keys import KEYS, TENANT, Keys, read_keys
from ruvon.server.middleware import FACTS, as_ours, error_response, json_response, take_request_id
from ruvon.server.reload import watch_files, watched
from ruvon.server.threads import Aside
from ruvon.server.tls import TLS, load_certificate

log = structlog.get_logger(__name__)

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
Restart: TypeAlias = Callable[[], bool]
"""Begins to restart one replica after another; False if that is under way already."""


@dataclass(slots=True)
class Routing:
    """What the handlers share beside the fleet."""

    server: ServerConfig
    restart: Restart | None = None  # where the replicas are the router's own
    changed: Callable[[Replica], None] = lambda replica: None
    secret: bytes | None = None  # shared with replicas, which tell what was spent there
    failure: BaseException | None = None  # why it had to end
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def key(self) -> str | None:
        """For questions of the router's own: an admin's, where there is one."""
        keys = sorted(read_keys(self.server), key=lambda key: not key.is_admin)
        return keys[0].text if keys else None


ROUTING = web.AppKey("routing", Routing)


def create_router(fleet: Fleet, routing: Routing) -> web.Application:
    """The router as an aiohttp application; run it with ``handler_cancellation=True``."""
    size = parse_size(routing.server.max_body_size)
    app = web.Application(middlewares=[observe], client_max_size=size)
    app[FLEET], app[ROUTING] = fleet, routing
    app[KEYS] = keys = Keys(read_keys(routing.server), secret=routing.secret)
    tokens = routing.server.rate_limit_tokens if routing.secret else None
    app[rate_limits.LIMITS] = rate_limits.RateLimits(routing.server.rate_limit_requests, tokens)
    app[TLS] = load_certificate(routing.server)
    app[READER] = Aside("ruvon-read")
    app.cleanup_ctx.append(watch_files(watched(routing.server, keys, app[TLS])))
    app[METRICS], app[TOTALS] = RouterMetrics(fleet), Totals()
    app.add_routes(
        [
            web.get("/live", live),
            web.get("/ready", ready),
            web.get("/health", health),
            web.get("/metrics", metrics),
            web.get("/router/replicas", replicas),
            web.post("/router/replicas/{name}/{what:drain|resume}", hold_back),
            web.post("/router/restart", restart),
            web.route("*", "/{path:.*}", forward),
        ]
    )
    app.on_response_prepare.append(add_headers)
    app.cleanup_ctx.append(watching)
    return app


async def watching(app: web.Application) -> AsyncIterator[None]:
    """Look after the replicas as long as the application runs."""
    routing = app[ROUTING]
    charge = charger(app[rate_limits.LIMITS], routing.secret)
    task = asyncio.create_task(watch(app[FLEET], routing.key, routing.changed, charge))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for replica in app[FLEET].replicas:
        replica.lose()
    app[READER].close()


def charger(limits: rate_limits.RateLimits, secret: bytes | None) -> Callable[[Replica], None]:
    """What counts against tenants' limits what a replica says they have spent."""
    if secret is None:
        return lambda replica: None
    tenants: dict[str, str] = {}  # by account

    def charge(replica: Replica) -> None:
        for account, num_tokens in replica.take_spent().items():
            if num_tokens and account not in tenants:
                known = limits.tenants
                tenants.update({rate_limits.account_of(each, secret): each for each in known})
            if account in tenants:
                limits.spend(tenants[account], num_tokens)

    return charge


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request an id, run its handler, turn errors into JSON, and say what happened."""
    request[FACTS] = {"request_id": take_request_id(request)}
    began = request[FACTS]["began"] = time.monotonic()
    status = CLIENT_LEFT
    try:
        response = await respond(request, handler)
        status = response.outcome if isinstance(response, Relayed) else response.status
        return response
    finally:
        report(request, status, time.monotonic() - began)


async def respond(http: web.Request, handler: Handler) -> web.StreamResponse:
    """An error is told in the words of the API that was asked."""
    try:
        http[TENANT] = http.app[KEYS].check(http)
        rate_limits.enter(http)
        return await handler(http)
    except Exception as error:
        error = as_ours(error, http)
        if not isinstance(error, RequestError | UnavailableError):
            log.error("request_failed", exc_info=error)
        return error_response(error, error_answer(error, http, http[FACTS]["request_id"]))


async def add_headers(http: web.Request, response: web.StreamResponse) -> None:
    """Signal before a response's headers go out."""
    response.headers["Server"] = "ruvon"
    limits = http.app[rate_limits.LIMITS]
    if limits and rate_limits.is_limited(http):
        response.headers.update(limits.headers(http[TENANT]))
    if FACTS in http:
        response.headers["X-Request-Id"] = http[FACTS]["request_id"]
        if "anthropic-version" in http.headers:
            response.headers["Request-Id"] = http[FACTS]["request_id"]
        if "began" in http[FACTS]:
            http.app[METRICS].record_first_byte(time.monotonic() - http[FACTS]["began"])


def report(http: web.Request, status: int, seconds: float) -> None:
    """Metrics, and the request's log line."""
    routing = http.app[ROUTING]
    if http.match_info.handler is not forward:
        return
    http.app[METRICS].record(str(status), seconds)
    if routing.server.log_requests:
        facts = {name: fact for name, fact in http[FACTS].items() if name != "began"}
        ms = round(1000 * seconds, 1)
        path = http.path[:200]
        log.info("request", method=http.method, path=path, status=status, ms=ms, **facts)


async def live(http: web.Request) -> web.Response:
    """The router works; whether its replicas do is another question."""
    return json_response({"status": "alive"})


async def health(http: web.Request) -> web.Response:
    """Whether any request can be answered."""
    ok = http.app[FLEET].num_open > 0
    return json_response({"status": "ok" if ok else "unavailable"}, 200 if ok else 503)


async def ready(http: web.Request) -> web.Response:
    """Whether new requests are wanted: some replica takes them."""
    fleet = http.app[FLEET]
    status = "draining" if fleet.draining else "ready" if fleet.num_open else "loading"
    body = {"status": status, "ready": fleet.num_open, "replicas": len(fleet.replicas)}
    if status == "ready":
        return json_response(body)
    return json_response(body, 503, {"Retry-After": "1"})


async def metrics(http: web.Request) -> web.Response:
    """The router's numbers, and those of all replicas together."""
    app = http.app
    body = await render(app[METRICS], app[TOTALS], app[FLEET].replicas, app[ROUTING].key)
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def replicas(http: web.Request) -> web.Response:
    """Every replica as the router sees it."""
    fleet = http.app[FLEET]
    return json_response({"object": "list", "data": [shown(each) for each in fleet.replicas]})


def shown(replica: Replica) -> dict[str, object]:
    return {
        "name": replica.name,
        "url": replica.url,
        "status": "draining" if replica.held_back else replica.status,
        "in_flight": replica.in_flight,
        "load": replica.load,
        "prefixes": len(replica.prefixes),
        "epoch": replica.epoch,
    }


async def hold_back(http: web.Request) -> web.Response:
    """Give a replica no new requests, or give it some again."""
    name = http.match_info["name"]
    replica = next((each for each in http.app[FLEET].replicas if each.name == name), None)
    if replica is None:
        raise RequestError(f"There is no replica '{name[:100]}'.", "name")
    replica.held_back = http.match_info["what"] == "drain"
    return json_response(shown(replica))


async def restart(http: web.Request) -> web.Response:
    """Restart one replica after another, each when it has answered what it has."""
    begin = http.app[ROUTING].restart
    if begin is None:
        raise ConflictError("These replicas were not started by this router.")
    if not begin():
        raise ConflictError("A restart is under way.")
    return json_response({"status": "restarting"}, 202)


class ConflictError(RequestError):
    """Not now, or not here."""

    status = 409
    code = "conflict"
