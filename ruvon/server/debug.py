"""What the engine does, for whoever runs it: its last steps, a trace of them, and recordings."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from ruvon.engine.recorder import Event, Step
from ruvon.engine.recording import Recording
from ruvon.engine.trace import chrome_trace
from ruvon.errors import RequestError
from ruvon.server.state import service_of

MOST_STEPS, LONGEST = 100_000, 600.0  # of a recording; the latter in seconds
JSON_LINES = "application/x-ndjson"
USUAL_STEPS, MOST_SHOWN = 100, 10_000


async def steps(http: web.Request) -> web.Response:
    """The last ``limit`` steps, or the first so many behind the event ``since``: of those that are
    still remembered."""
    recorder = service_of(http).generator.observer.recorder
    limit = int(number(http, "limit", USUAL_STEPS, MOST_SHOWN))
    since = int(number(http, "since", 0, 1e15, least=0))
    events, end = recorder.since(since), recorder.end
    is_first = "since" in http.query
    body = await asyncio.to_thread(lambda: orjson.dumps(shown(events, end, limit, is_first)))
    return web.Response(body=body, content_type="application/json")


def shown(events: Sequence[Event], end: int, limit: int, is_first: bool) -> dict[str, Any]:
    """The first or the last ``limit`` steps of the events whose last is before ``end``."""
    numbered = [
        (number, event)
        for number, event in enumerate(events, end - len(events))
        if isinstance(event, Step)
    ]
    if is_first and len(numbered) > limit:
        numbered, end = numbered[:limit], numbered[limit][0]
    return {"steps": [described(step) for _, step in numbered[-limit:]], "next": end}


def described(step: Step) -> dict[str, Any]:
    """A step in words that need no source: sequences are numbers, times are seconds."""
    return {
        "step": step.number,
        "planned_at": step.planned_at,
        "ended_at": step.at,
        "sampled": step.rows,
        "chunks": [
            {"sequence": seq_id, "start": start, "tokens": num_tokens}
            for seq_id, _, start, num_tokens, _, _ in step.work
        ],
        "started": [{"sequence": seq_id, "cached": cached} for seq_id, cached in step.new],
        "left": step.left,
        "finished": [{"sequence": seq_id, "reason": reason} for seq_id, reason in step.finished],
        "failure": step.failure or None,
        "stats": step.stats,
    }


async def trace(http: web.Request) -> web.Response:
    """The steps that are still remembered, as a Chrome trace."""
    events = service_of(http).generator.observer.recorder.since(0)
    body = await asyncio.to_thread(lambda: orjson.dumps(chrome_trace(events)))
    return web.Response(body=body, content_type="application/json")


async def recording(http: web.Request) -> web.Response:
    """Record ``steps`` steps, or as many as there are in ``seconds``, and give the file.
    ``contents=1`` puts the tokens of prompts and answers into it."""
    generator = service_of(http).generator
    steps = int(number(http, "steps", 1000, MOST_STEPS))
    seconds = number(http, "seconds", 10.0, LONGEST)
    contents = http.query.get("contents", "0") not in ("0", "false")
    made = await generator.observer.record(steps, seconds)
    body = await asyncio.to_thread(write, made, contents)
    return web.Response(body=body, content_type=JSON_LINES)


def write(made: Recording, contents: bool) -> bytes:
    return b"".join(made.lines(contents))


def number(
    http: web.Request, name: str, default: float, most: float, least: float | None = None
) -> float:
    """A number in the URL's query, above 0 or at ``least`` so much. Raises `RequestError`."""
    text = http.query.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 if least is None else value >= least) or value > most:
        start = "above 0" if least is None else f"{least:g}"
        raise RequestError(f"{name} must be a number from {start} to {most:g}.", name)
    return value
