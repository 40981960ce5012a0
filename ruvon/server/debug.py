"""What the engine does, for whoever runs it: a trace of its last steps, and recordings."""

from __future__ import annotations

import asyncio

import orjson
from aiohttp import web

from ruvon.engine.recording import Recording
from ruvon.engine.trace import chrome_trace
from ruvon.errors import RequestError
from ruvon.server.state import service_of

MOST_STEPS, LONGEST = 100_000, 600.0  # of a recording; the latter in seconds
JSON_LINES = "application/x-ndjson"


async def trace(http: web.Request) -> web.Response:
    """The steps that are still remembered, as a Chrome trace."""
    events = service_of(http).generator.recorder.since(0)
    body = await asyncio.to_thread(lambda: orjson.dumps(chrome_trace(events)))
    return web.Response(body=body, content_type="application/json")


async def recording(http: web.Request) -> web.Response:
    """Record ``steps`` steps, or as many as there are in ``seconds``, and give the file.
    ``contents=1`` puts the tokens of prompts and answers into it."""
    generator = service_of(http).generator
    steps = int(number(http, "steps", 1000, MOST_STEPS))
    seconds = number(http, "seconds", 10.0, LONGEST)
    contents = http.query.get("contents", "0") not in ("0", "false")
    made = await generator.record(steps, seconds)
    body = await asyncio.to_thread(write, made, contents)
    return web.Response(body=body, content_type=JSON_LINES)


def write(made: Recording, contents: bool) -> bytes:
    return b"".join(made.lines(contents))


def number(http: web.Request, name: str, default: float, most: float) -> float:
    """A positive number in the URL's query. Raises `RequestError`."""
    text = http.query.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= most:
        raise RequestError(f"{name} must be a number from above 0 to {most:g}.", name)
    return value
