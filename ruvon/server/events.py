"""Server-sent events: framing, keep-alive, and the one place that meets a client that left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import NamedTuple, Protocol

import orjson
import structlog
from aiohttp import web

from ruvon.errors import RequestError, UnavailableError
from ruvon.server.failures import failure, openai_error

log = structlog.get_logger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
CLIENT_LEFT = 499  # how logs and metrics call it; nobody receives this status
HEADERS = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx: pass events on at once
}


class Media(NamedTuple):
    """What a stream is made of, and what it says when it has long had nothing to say."""

    content_type: str
    beat: Callable[[], bytes]  # may be empty


EVENTS = Media("text/event-stream; charset=utf-8", lambda: KEEP_ALIVE)


class Framing(Protocol):
    """How an API ends its streams. Every `Writer` is one."""

    @property
    def done(self) -> bytes:
        """What goes out last of all, after an error too."""

    def error(self, error: Exception) -> bytes:
        """Events that tell of a failure in mid-stream. Clients raise for it; a stream that just
        ends looks like success."""


def event(data: object, name: str | None = None) -> bytes:
    """One event of JSON, with its name on a line of its own if it has one."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return b"".join((head, b"data: ", orjson.dumps(data), b"\n\n"))  # copied once


def error_event(error: Exception) -> bytes:
    """A failure in mid-stream as OpenAI's chat and completions tell it."""
    return event(openai_error(error))


class EventResponse(web.StreamResponse):
    """A response of events. ``outcome`` is the status for logs and metrics: an error in mid-stream
    comes too late for the one that the client saw, and whoever left early has seen no end."""

    outcome = CLIENT_LEFT
    error: str | None = None  # its code


async def send_events(
    http: web.Request,
    events: AsyncIterator[bytes],
    framing: Framing,
    headers: Mapping[str, str],
    keep_alive: float,
    media: Media = EVENTS,
) -> web.StreamResponse:
    """Write ``events`` as they come; an error becomes the last one.

    A client that leaves cancels this task (aiohttp's ``handler_cancellation``), and the caller's
    ``aclosing`` frees what it held; a write that finds the connection gone just ends here.
    """
    response = EventResponse(headers={"Content-Type": media.content_type, **HEADERS, **headers})
    failed: Exception | None = None
    with suppress(ConnectionResetError):
        await response.prepare(http)
        with Pulse(response, keep_alive, media.beat) as pulse:
            try:
                async for data in events:
                    await pulse.write(data)
            except ConnectionResetError:
                raise
            except Exception as error:
                failed = error
                response.outcome, response.error = failure(error).status, failure(error).code
                await pulse.write(framing.error(error))
        await response.write_eof(framing.done)
        if failed is None:
            response.outcome = 200
    if failed is not None:  # told to the client first
        log_failure(failed)
    return response


class Pulse:
    """Writes events, and a ``beat`` after every ``interval`` seconds without one (0 is never), so
    that proxies keep a quiet connection open. One timer for a stream, none for each event."""

    def __init__(
        self, response: web.StreamResponse, interval: float, beat: Callable[[], bytes]
    ) -> None:
        self._response = response
        self._interval = interval
        self._say = beat
        self._loop = asyncio.get_running_loop()
        self._written_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None  # being written

    def __enter__(self) -> Pulse:
        if self._interval > 0:
            self._timer = self._loop.call_later(self._interval, self._beat)
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()

    def write(self, data: bytes) -> Awaitable[None]:
        """Send ``data``; waits while the client is slower than we are."""
        self._written_at = self._loop.time()
        return self._response.write(data)

    def _beat(self) -> None:
        quiet = self._loop.time() - self._written_at
        if quiet >= self._interval:
            quiet = 0.0
            data = self._say()
            if data and (self._comment is None or self._comment.done()):
                self._comment = self._loop.create_task(self._write_comment(data))
        self._timer = self._loop.call_later(self._interval - quiet, self._beat)

    async def _write_comment(self, data: bytes) -> None:
        with suppress(ConnectionResetError):
            await self.write(data)


def log_failure(error: Exception) -> None:
    if isinstance(error, RequestError | UnavailableError):
        log.warning("stream_failed", error=error.message, error_code=error.code)
    else:
        log.error("stream_failed", exc_info=error)
