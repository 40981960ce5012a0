"""The engine at work, for the page that watches it; costs nothing while nobody does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated

import orjson
from aiohttp import web
from pydantic import Field

from ruvon.engine.live import encode
from ruvon.errors import RequestError, UnavailableError
from ruvon.server.events import error_event, send_events
from ruvon.server.middleware import json_response
from ruvon.server.receive import receive
from ruvon.server.requests import read_fields
from ruvon.server.schemas import Fields
from ruvon.server.state import STATE, Generator, service_of

EVERY = 0.04  # seconds between two looks at what has happened
CACHED_EVERY = 0.5  # seconds between two lists of the blocks that are cached
MOST_LISTED = 16_384  # blocks of a cache whose list is told again and again
MOST_EVENTS = 500  # in one message; whoever is further behind begins anew
LEASE = 10.0  # seconds for which a gate holds without being asked again
MOST_WATCHERS = 16

WATCHERS = web.AppKey("watchers", set[object])


class Ends:
    """How the stream ends: it does so with the server only."""

    done = b""
    error = staticmethod(error_event)


async def live(http: web.Request) -> web.StreamResponse:
    """``begin`` with how the engine stands, then ``events`` as they happen. A reader that is too
    slow misses some, and gets another ``begin``."""
    service, watchers = service_of(http), http.app[WATCHERS]
    if len(watchers) >= MOST_WATCHERS:
        raise UnavailableError(f"{MOST_WATCHERS} pages are watching already.", retry_after=10.0)
    watchers.add(token := object())
    server = http.app[STATE].server
    try:
        async with aclosing(watch(service.generator)) as events:
            return await send_events(http, events, Ends(), {}, server.sse_keep_alive_interval)
    finally:
        watchers.discard(token)


async def watch(generator: Generator) -> AsyncGenerator[bytes]:
    """What happens, in messages of `EVERY` seconds each."""
    observer, clock = generator.observer, asyncio.get_running_loop().time
    recorder = observer.recorder
    number, pace, missed = -1, 0.0, 0
    num_blocks, listed_at = observer.header.num_blocks, clock()
    while generator.dead is None:
        if number < 0 or missed > MOST_EVENTS:
            standing = observer.stand()
            number = standing.next
            begin = {"made_of": observer.header, "standing": standing, "missed": missed}
            yield message("begin", begin)
        elif missed or generator.gate.pace != pace:
            events, pace = recorder.since(number), generator.gate.pace
            number += len(events)
            news: dict[str, object] = {"events": [encode(each) for each in events], "pace": pace}
            if clock() - listed_at > CACHED_EVERY and num_blocks <= MOST_LISTED:
                news["cached"], listed_at = observer.cached_blocks, clock()
            yield message("events", news)
        await asyncio.sleep(EVERY)
        missed = recorder.end - number


def message(kind: str, what: Mapping[str, object]) -> bytes:
    return b"data: " + orjson.dumps({"kind": kind, **what}) + b"\n\n"


class GateRequest(Fields):
    """``POST /debug/gate``. It holds for 10 seconds, then it has to be asked for again."""

    pace: Annotated[float, Field(ge=0, le=600)] | None = None  # seconds a step; 0: no more
    step: bool | None = None  # let one through now


async def gate(http: web.Request) -> web.Response:
    """Slow the engine down, for all requests."""
    if not http.app[STATE].server.ui_step_gate:
        raise RequestError(
            "Slow motion is not allowed on this server (--ui-step-gate).", None, "not_allowed"
        )
    service = service_of(http)
    request, _ = read_fields(GateRequest, b"".join(await receive(http)), service)
    gate = service.generator.gate
    if request.pace == 0:
        gate.open()
    elif request.pace is not None:
        gate.hold(request.pace, LEASE)
    if request.step:
        gate.step()
    return json_response({"pace": gate.pace})
