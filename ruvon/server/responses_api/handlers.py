"""``/v1/responses`` and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

import orjson
from aiohttp import web

from ruvon.errors import RequestError
from ruvon.server.body import offload, read
from ruvon.server.conversation import take_turn, without_effect
from ruvon.server.deadlines import limit_time
from ruvon.server.events import event, send_events
from ruvon.server.generation import Generation, ignored_header
from ruvon.server.keys import TENANT
from ruvon.server.middleware import json_response
from ruvon.server.parsing import MAX_IGNORED, SMALL
from ruvon.server.requests import read_fields
from ruvon.server.responses_api.background import start, stop
from ruvon.server.responses_api.compact import CompactWriter, prepare_summary
from ruvon.server.responses_api.input import ReferenceItem
from ruvon.server.responses_api.output import new_id
from ruvon.server.responses_api.prepare import (
    Context,
    Prepared,
    all_items,
    conversation_of,
    prepare,
    skipped,
    transcribe,
)
from ruvon.server.responses_api.schemas import (
    CompactRequest,
    ContextFields,
    InputTokensRequest,
    ResponsesRequest,
)
from ruvon.server.responses_api.store import RESPONSES, ResponseStore, Stored
from ruvon.server.responses_api.tools import toolbox
from ruvon.server.responses_api.writer import ResponsesWriter, error_fields
from ruvon.server.state import STATE, Service, service_of

C = TypeVar("C", bound=ContextFields)
T = TypeVar("T")

USUAL_PAGE, LARGEST_PAGE = 20, 100  # items of a list, as OpenAI has it


async def create(http: web.Request) -> web.StreamResponse:
    """Answer, and keep the answer."""
    state, store = http.app[STATE], http.app[RESPONSES]
    service, server = service_of(http), state.server

    def work(request: ResponsesRequest, context: Context) -> tuple[Prepared, Context]:
        kept = server.store_responses and request.store is not False
        if request.background and not kept:
            raise RequestError("background needs a server that stores responses.", "background")
        return prepare(request, context, service, server.max_logprobs, kept=kept), context

    request, ignored, (ready, context) = await understand(http, ResponsesRequest, work)
    ignored = without_effect(http, ignored, ready.skipped)
    told = ready.kept and bool(request.stream or request.background)
    entry, writer = begin(store, ready, context, service, told=told)
    entry.owner = http[TENANT]
    generation = Generation(http, service, [ready.job], writer, ready.turn.parser)
    if request.background:
        await start(http.app, entry, writer, generation)
        if request.stream:
            return await follow(http, entry, 0, ignored)
        return json_response(writer.snapshot(), headers=ignored_header(ignored))
    try:
        return await generation.send(stream=bool(request.stream), ignored=ignored)
    finally:
        if entry.recording is not None and entry.id not in store:
            entry.recording.drop()


def begin(
    store: ResponseStore, ready: Prepared, context: Context, service: Service, *, told: bool
) -> tuple[Stored, ResponsesWriter]:
    """A response to be, and what writes it. It is recorded if its events will be ``told``."""
    recording = store.recording() if told else None
    entry = Stored(new_id("resp"), context.history, ready.items, recording)
    writer = ResponsesWriter(
        entry.id,
        ready.fields,
        ready.shape,
        ready.job,
        service.tokenizer,
        keep=partial(store.finish, entry) if ready.kept else None,
        record=recording.add if recording else None,
    )
    return entry, writer


async def understand(
    http: web.Request, kind: type[C], work: Callable[[C, Context], T]
) -> tuple[C, list[str], T]:
    """The request, the names of what in it has no effect, and what ``work`` makes of it and the
    conversation that it goes on with. What is large is understood in a thread."""
    store, strict = http.app[RESPONSES], http.app[STATE].server.strict

    def parse(body: bytes, service: Service) -> tuple[C, list[str], int]:
        return *read_fields(kind, body, service, strict), len(body)

    request, ignored, size = await read(http, parse)
    limit_time(http, getattr(request, "timeout", None))
    previous, owner = request.previous_response_id, http[TENANT]
    named = (item.id for item in request.input or () if isinstance(item, ReferenceItem))
    context = Context(
        () if previous is None else store.previous(previous, owner), store.find(named, owner)
    )
    done = await offload(http.app, size + context.size > SMALL, partial(work, request, context))
    return request, ignored, done


async def follow(
    http: web.Request, entry: Stored, number: int, ignored: Sequence[str]
) -> web.StreamResponse:
    """Send a response's events from ``number`` on, those to come too."""
    if entry.recording is None:
        raise RequestError("This response was not streamed.", "stream")
    entry.recording.check()
    interval = http.app[STATE].server.sse_keep_alive_interval
    async with aclosing(entry.recording.follow(number)) as events:
        return await send_events(http, events, Replay, ignored_header(ignored), interval)


class Replay:
    """How a stream ends that is read again; its own end is among its events."""

    done = b""

    @staticmethod
    def error(error: Exception) -> bytes:
        return event({"type": "error", "sequence_number": 0, **error_fields(error)}, "error")


async def retrieve(http: web.Request) -> web.StreamResponse:
    """A response as far as it has come, or its events again."""
    entry = find(http)
    stream = http.query.get("stream", "false").lower()
    if stream not in ("true", "1", "false", "0"):
        raise RequestError("stream must be true or false.", "stream", "invalid_type")
    if stream in ("true", "1"):
        number = max(number_in(http, "starting_after", -1) + 1, 0)
        return await follow(http, entry, number, unread(http, "stream", "starting_after"))
    return as_json(entry, unread(http, "stream"))


async def delete(http: web.Request) -> web.Response:
    """Forget a response, and end it if it runs."""
    entry = http.app[RESPONSES].delete(http.match_info["id"], http[TENANT])
    await stop(entry)
    return json_response({"id": entry.id, "object": "response", "deleted": True})


async def cancel(http: web.Request) -> web.Response:
    """End a response that runs in the background; one that has ended stays as it is."""
    entry = find(http)
    if not entry.background:
        raise RequestError("Only a response with background: true can be cancelled.", None)
    await stop(entry)
    return as_json(entry)


async def input_items(http: web.Request) -> web.Response:
    """What a response answers: the newest first, a page at a time."""
    entry = find(http)
    order = http.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise RequestError("order must be 'asc' or 'desc'.", "order")
    limit = number_in(http, "limit", USUAL_PAGE)
    if not 1 <= limit <= LARGEST_PAGE:
        raise RequestError(f"limit must be from 1 to {LARGEST_PAGE}.", "limit")
    items = entry.context if order == "asc" else entry.context[::-1]
    if (after := http.query.get("after")) is not None:
        ids = [item.id for item in items]
        if after not in ids:
            raise RequestError(f"There is no item '{after[:100]}' in this list.", "after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return json_response(
        {
            "object": "list",
            "data": [orjson.Fragment(item.json) for item in page],
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": len(items) > limit,
        },
        headers=ignored_header(unread(http, "order", "limit", "after")),
    )


async def input_tokens(http: web.Request) -> web.Response:
    """How many tokens a request's prompt would have."""
    service = service_of(http)

    def work(request: InputTokensRequest, context: Context) -> tuple[int, list[str]]:
        transcript, box = transcribe(request, all_items(request, context)), toolbox(request)
        turn = take_turn(conversation_of(request, transcript, box), service)
        return len(turn.prompt), skipped(transcript, box, turn)

    _, ignored, (number, found) = await understand(http, InputTokensRequest, work)
    told = {"object": "response.input_tokens", "input_tokens": number}
    headers = ignored_header(without_effect(http, ignored, found))
    return json_response(told, headers=headers)


async def compact(http: web.Request) -> web.StreamResponse:
    """A conversation in short: what the user said, and the model's own summary of all."""
    service = service_of(http)

    def work(request: CompactRequest, context: Context) -> Any:
        return prepare_summary(request, context, service)

    _, ignored, (job, turn, items, found) = await understand(http, CompactRequest, work)
    ignored = without_effect(http, ignored, found)
    generation = Generation(http, service, [job], CompactWriter(job, items), turn.parser)
    return await generation.send(stream=False, ignored=ignored)


def find(http: web.Request) -> Stored:
    return http.app[RESPONSES].get(http.match_info["id"], http[TENANT])


def as_json(entry: Stored, ignored: Sequence[str] = ()) -> web.Response:
    body = entry.response if entry.writer is None else orjson.dumps(entry.writer.snapshot())
    headers = ignored_header(ignored)
    return web.Response(body=body, content_type="application/json", headers=headers)


def unread(http: web.Request, *read: str) -> list[str]:
    """Names in the query beside those that are ``read``."""
    return [name[:100] for name in dict.fromkeys(http.query) if name not in read][:MAX_IGNORED]


def number_in(http: web.Request, name: str, default: int) -> int:
    """A number among the query's parameters."""
    text = http.query.get(name, str(default))
    if not text.removeprefix("-").isascii() or not text.removeprefix("-").isdigit():
        raise RequestError(f"{name} must be a whole number.", name, "invalid_type")
    return int(text[:20])
