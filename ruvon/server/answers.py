"""From jobs to an answer: one conductor for completions and chat, streaming or not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol
from urllib.parse import quote
from uuid import uuid4

import orjson
from aiohttp import web

from ruvon.engine.stream import Stream
from ruvon.engine.types import Emission, Job
from ruvon.server.choices import Choices, Piece, joined
from ruvon.server.events import Envelope, send_events
from ruvon.server.middleware import FACTS
from ruvon.server.schemas import GenerationFields
from ruvon.server.state import STATE, Service


class Format(Protocol):
    """How one endpoint writes its choices."""

    id_prefix: str
    name: str
    chunk_name: str

    def opening(self) -> tuple[Sequence[object], Mapping[str, object] | None]:
        """Chunk choices that go before all others, and more fields of those chunks."""

    def chunks(self, piece: Piece) -> Sequence[object]:
        """Chunk choices for a piece; none if it shows nothing."""

    def whole(self, pieces: Sequence[Piece]) -> Mapping[str, object]:
        """The answer's own fields, ``choices`` among them, from the folded pieces of each."""


async def first_news(stream: Stream, patience: float) -> list[Emission]:
    """The first emissions, or none if they take longer than ``patience`` seconds (0: wait).

    A stream's status goes out after this: what fails early has a status of its own, and a long
    wait does not look like a dead server.
    """
    try:
        async with asyncio.timeout(patience or None):
            return await anext(stream)
    except TimeoutError:
        return []


class Answer:
    """One request being answered."""

    def __init__(
        self, request: GenerationFields, jobs: Sequence[Job], format: Format, service: Service
    ) -> None:
        self._request = request
        self._jobs = jobs
        self._format = format
        self._service = service
        self._choices = Choices(jobs, service.tokenizer)
        self._started_at = time.monotonic()
        self._first_at: float | None = None
        self._fields: dict[str, Any] = {
            "id": f"{format.id_prefix}-{uuid4().hex}",
            "object": format.chunk_name if request.stream else format.name,
            "created": int(time.time()),
            "model": request.model or service.names[0],
            "system_fingerprint": service.fingerprint,
        }

    async def send(self, http: web.Request, ignored: Sequence[str]) -> web.StreamResponse:
        """Run the jobs and send what they give. Whichever way this is left, it frees what the
        jobs held."""
        names = ",".join(quote(name, safe="[]") for name in ignored)
        headers = {"X-Ruvon-Ignored": names} if names else {}
        async with aclosing(self._service.loop.generate(self._jobs)) as stream:
            try:
                if self._request.stream:
                    interval = http.app[STATE].server.sse_keep_alive_interval
                    first = self._push(await first_news(stream, interval), stream)
                    async with aclosing(self._events(first, stream)) as events:
                        return await send_events(http, events, headers, interval)
                body = orjson.dumps(await self._fold(stream))
                return web.Response(body=body, content_type="application/json", headers=headers)
            finally:
                http[FACTS].update(self._facts())

    async def _fold(self, stream: Stream) -> Mapping[str, Any]:
        """The whole answer."""
        parts: list[list[Piece]] = [[] for job in self._jobs for _ in range(job.n)]
        async for emissions in stream:
            for piece in self._push(emissions, stream):
                parts[piece.index].append(piece)
        pieces = [joined(part) for part in parts]
        return {**self._fields, **self._format.whole(pieces), "usage": self._choices.usage()}

    async def _events(self, first: list[Piece], stream: Stream) -> AsyncGenerator[bytes, None]:
        """The answer as events: one run of bytes for each step, whatever the number of chunks."""
        request = self._request
        envelope = Envelope(self._fields, request.include_usage)
        opening, extra = self._format.opening()
        data = b"".join(envelope.chunk(choice, extra) for choice in opening)
        yield data + self._chunks(first, envelope)
        async for emissions in stream:
            data = self._chunks(self._push(emissions, stream), envelope)
            if data:
                yield data
        if request.include_usage:
            yield envelope.usage(self._choices.usage())

    def _push(self, emissions: Sequence[Emission], stream: Stream) -> list[Piece]:
        if self._first_at is None and emissions:
            self._first_at = time.monotonic()
        return self._choices.push(emissions, stream)

    def _chunks(self, pieces: Iterable[Piece], envelope: Envelope) -> bytes:
        data = b""
        for piece in pieces:
            for choice in self._format.chunks(piece):
                data += envelope.chunk(choice, self._usage_so_far())
        return data

    def _usage_so_far(self) -> Mapping[str, object] | None:
        return {"usage": self._choices.usage()} if self._request.continuous_usage else None

    def _facts(self) -> Mapping[str, object]:
        """What the request's log line says of it."""
        usage = self._choices.usage()
        facts: dict[str, object] = {
            "id": self._fields["id"],
            "stream": bool(self._request.stream),
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "output_tokens": usage["completion_tokens"],
        }
        if self._first_at is not None:
            facts["ttft_ms"] = round(1000 * (self._first_at - self._started_at), 1)
        return facts
