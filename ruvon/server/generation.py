"""From jobs to an answer: one way for every API, streaming or not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from urllib.parse import quote

import orjson
from aiohttp import web

from ruvon.deltas import Delta, FinishReason
from ruvon.engine.detokenizer import Detokenizer, MakeParser
from ruvon.engine.draw import NOTHING_LEFT
from ruvon.engine.matching import EXHAUSTED
from ruvon.engine.stream import Stream
from ruvon.engine.types import Emission, Job
from ruvon.errors import GenerationError, RequestError, ShuttingDownError
from ruvon.server.body import offload
from ruvon.server.events import EVENTS, KEEP_ALIVE, Media, send_events
from ruvon.server.middleware import FACTS
from ruvon.server.queueing import queue, spender
from ruvon.server.resume import KEPT, send_kept
from ruvon.server.state import STATE, Service
from ruvon.server.writers import Writer


class Generation:
    """One request being answered: the engine's emissions become deltas, a writer folds them."""

    def __init__(
        self,
        http: web.Request,
        service: Service,
        jobs: Sequence[Job],
        writer: Writer,
        parser: MakeParser,
    ) -> None:
        self._http = http
        self._service = service
        self._spend = spender(http)
        self._jobs = jobs
        self._writer = writer
        self._detokenizer = Detokenizer(jobs, service.tokenizer, parser)
        # What a prompt's tokens scored takes long to write.
        self._scored = any(job.sampling.prompt_logprobs is not None for job in jobs)
        self._started_at = time.monotonic()
        self._first_at: float | None = None

    async def send(
        self, *, stream: bool, ignored: Sequence[str] = (), media: Media = EVENTS
    ) -> web.StreamResponse:
        """Run the jobs and send what they give, as a ``stream`` or as a whole; ``ignored`` are
        fields of the request that have no effect. Whichever way this is left, it frees what the
        jobs held."""
        http, headers = self._http, ignored_header(ignored)
        interval = http.app[STATE].server.sse_keep_alive_interval
        if stream and http.app[KEPT].wants(http, self._writer.id):
            return await self._send_kept(headers, interval)
        async with aclosing(self._queue()) as source:
            try:
                if stream:
                    media = self._telling(media, source)
                    first = self._push(await first_news(source, interval), source)
                    headers |= self._cache_headers(first)
                    async with aclosing(self._events(http.app, first, source, media)) as events:
                        return await send_events(
                            http, events, self._writer, headers, interval, media
                        )
                body = await self._fold(http.app, source)
                tally = self._writer.tally
                headers |= cache_headers(tally.num_prompt, tally.num_cached)
                return web.Response(body=body, content_type="application/json", headers=headers)
            finally:
                http[FACTS].update(self._facts(stream))

    async def _send_kept(self, headers: Mapping[str, str], interval: float) -> web.StreamResponse:
        """As a stream that outlives its connection."""
        http, writer = self._http, self._writer
        kept = http.app[KEPT].keep(writer.id, http, self.run(), writer)
        try:
            return await send_kept(http, kept, 0, headers, interval)
        finally:
            http[FACTS].update(self._facts(True))

    def run(self) -> AsyncGenerator[bytes, None]:
        """Queue the jobs, or raise why not; what they give comes as events, whoever reads them."""
        return self._detached(self._http.app, self._queue())

    def _queue(self) -> Stream:
        return queue(self._http, self._service, self._jobs, self._writer.id)

    def _telling(self, media: Media, source: Stream) -> Media:
        """The same, whose comments say what the stream waits for."""

        def beat() -> bytes:
            said = media.beat()
            progress = self._service.generator.progress(source) if said == KEEP_ALIVE else ""
            return b": %s\n\n" % progress.encode() if progress else said

        return media._replace(beat=beat)

    async def _detached(self, app: web.Application, source: Stream) -> AsyncGenerator[bytes, None]:
        async with aclosing(source), aclosing(self._events(app, [], source, EVENTS)) as events:
            async for data in events:
                yield data

    async def _fold(self, app: web.Application, source: Stream) -> bytes:
        """The whole answer."""
        async for emissions in source:
            await offload(app, self._scored, partial(self._feed, self._push(emissions, source)))
        return await offload(app, self._scored, lambda: orjson.dumps(self._writer.result()))

    async def _events(
        self, app: web.Application, first: list[Delta], source: Stream, media: Media
    ) -> AsyncGenerator[bytes, None]:
        """The answer as events: one run of bytes for each step, whatever the number of chunks. The
        headers go out with the first, so there is one even if nothing is to be said yet."""
        writer = self._writer
        start = writer.opening() + await offload(app, self._scored, partial(self._write, first))
        if data := start or media.beat():
            yield data
        async for emissions in source:
            deltas = self._push(emissions, source)
            if data := await offload(app, self._scored, partial(self._write, deltas)):
                yield data
        if data := writer.closing():
            yield data

    def _feed(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            self._writer.feed(delta)

    def _write(self, deltas: Iterable[Delta]) -> bytes:
        return b"".join([self._writer.events(delta) for delta in deltas])

    def _push(self, emissions: Sequence[Emission], source: Stream) -> list[Delta]:
        """Raises `UnavailableError` when the engine gave a sequence up."""
        if self._first_at is None and emissions:
            self._first_at = time.monotonic()
        self._spend(emissions)
        self._writer.tally.finished = source.finished
        deltas = self._detokenizer.push(emissions, source.stop)
        for delta in deltas:
            check_end(delta.finish, delta.error)
        return deltas

    def _cache_headers(self, first: Sequence[Delta]) -> dict[str, str]:
        """Before the writer is fed: of one prompt whose first token is there, else nothing."""
        num_cached = next((delta.num_cached for delta in first if delta.tokens), None)
        if num_cached is None or len(self._jobs) > 1:
            return {}
        return cache_headers(len(self._jobs[0].prompt), num_cached)

    def _facts(self, stream: bool) -> dict[str, object]:
        """What the request's log line says of it."""
        tally = self._writer.tally
        facts: dict[str, object] = {
            "id": self._writer.id,
            "stream": stream,
            "prompt_tokens": tally.num_prompt,
            "cached_tokens": tally.num_cached,
            "output_tokens": tally.num_output,
        }
        if self._first_at is not None:
            facts["ttft_ms"] = round(1000 * (self._first_at - self._started_at), 1)
        return facts


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """What tells a client which of its fields have no effect."""
    joined = ",".join(quote(name, safe="[]") for name in names)
    return {"X-Ruvon-Ignored": joined} if joined else {}


def cache_headers(num_prompt: int, num_cached: int) -> dict[str, str]:
    """What tells a router how much of a prompt was cached, whichever API and stream or not."""
    return {"X-Ruvon-Prompt-Tokens": str(num_prompt), "X-Ruvon-Cached-Tokens": str(num_cached)}


REQUESTS_FAULT = {NOTHING_LEFT: "no_token_left", EXHAUSTED: "grammar_too_costly"}
"""The codes of errors that a request has brought upon itself."""


def check_end(finish: FinishReason | None, error: str | None) -> None:
    """Raise for a completion that did not come to its end."""
    if finish == "error" and error in REQUESTS_FAULT:
        raise RequestError(f"{error[0].upper()}{error[1:]}.", None, REQUESTS_FAULT[error])
    if finish == "error":
        raise GenerationError(error or "This completion could not be computed.")
    if finish == "abort":
        raise ShuttingDownError("The server is shutting down.", retry_after=1.0)


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
