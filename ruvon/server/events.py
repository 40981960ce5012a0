"""Server-sent events: framing, keep-alive, and the one place that meets a client that left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress

import orjson
import structlog
from aiohttp import web

from ruvon.errors import RequestError, UnavailableError
from ruvon.server.responses import ErrorAnswer

log = structlog.get_logger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
CLIENT_LEFT = 499  # how logs and metrics call it; nobody receives this status
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx: pass events on at once
}


class EventResponse(web.StreamResponse):
    """A response of events. ``outcome`` is the status for logs and metrics: an error in mid-stream
    comes too late for the one that the client saw, and whoever left early has seen no end."""

    outcome = CLIENT_LEFT


async def send_events(
    http: web.Request,
    events: AsyncIterator[bytes],
    headers: Mapping[str, str],
    keep_alive: float,
) -> web.StreamResponse:
    """Write ``events`` as they come, then ``[DONE]``; an error becomes the last event.

    A client that leaves cancels this task (aiohttp's ``handler_cancellation``), and the caller's
    ``aclosing`` frees what it held; a write that finds the connection gone just ends here.
    """
    response = EventResponse(headers={**HEADERS, **headers})
    failure: Exception | None = None
    with suppress(ConnectionResetError):
        await response.prepare(http)
        with Pulse(response, keep_alive) as pulse:
            try:
                async for data in events:
                    await pulse.write(data)
            except ConnectionResetError:
                raise
            except Exception as error:
                failure = error
                response.outcome = status_of(error)
                await pulse.write(error_event(error))
        await response.write_eof(DONE)
        if failure is None:
            response.outcome = 200
    if failure is not None:  # told to the client first
        log_failure(failure)
    return response


class Pulse:
    """Writes events, and a comment after every ``interval`` seconds without one (0 is never), so
    that proxies keep a quiet connection open. One timer for a stream, none for each event."""

    def __init__(self, response: web.StreamResponse, interval: float) -> None:
        self._response = response
        self._interval = interval
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
            if self._comment is None or self._comment.done():
                self._comment = self._loop.create_task(self._write_comment())
        self._timer = self._loop.call_later(self._interval - quiet, self._beat)

    async def _write_comment(self) -> None:
        with suppress(ConnectionResetError):
            await self.write(KEEP_ALIVE)


def status_of(error: Exception) -> int:
    """The HTTP status of an error; 500 for our own mistakes."""
    return error.status if isinstance(error, RequestError | UnavailableError) else 500


def error_answer(error: Exception) -> ErrorAnswer:
    """OpenAI's error object. What is our own mistake stays in the log, not in the answer."""
    if isinstance(error, RequestError):
        kind, param, code, message = error.type, error.param, error.code, error.message
    elif isinstance(error, UnavailableError):
        kind, param, code, message = error.type, None, error.code, error.message
    else:
        kind, param, code, message = "server_error", None, "internal_error", "Internal error."
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_event(error: Exception) -> bytes:
    """An error in mid-stream. Clients raise for it; a stream that just ends looks like success."""
    return b"data: " + orjson.dumps(error_answer(error)) + b"\n\n"


def log_failure(error: Exception) -> None:
    if isinstance(error, UnavailableError):
        log.warning("stream_failed", error=error.message, error_code=error.code)
    else:
        log.error("stream_failed", exc_info=error)
