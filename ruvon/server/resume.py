"""Streams that outlive their connection, for clients that ask for it and come back.

A request with ``X-Ruvon-Resume: true`` has its events numbered (``id: chatcmpl-…:17``). If its
connection breaks, generating goes on for a while, and a ``POST`` to the same path with the last
number seen in ``Last-Event-ID`` goes on behind it. What is kept is bounded: so many streams, so
many bytes that may have got lost, and so many that nobody has read, beyond which generating waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TypeAlias

from aiohttp import web

from ruvon.errors import StreamNotFoundError
from ruvon.server.events import KEEP_ALIVE, Framing, error_event, log_failure, send_events
from ruvon.server.keys import given_keys

MOST_STREAMS = 64
SENT_BYTES = 1 << 20  # of a stream, kept behind what was last written: it may not have arrived
UNREAD_BYTES = 1 << 20  # of a stream, before generating waits for a reader
AT_ONCE = 1 << 16  # bytes in one write

WANTED = "X-Ruvon-Resume"
PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/messages"})


Key: TypeAlias = tuple[str, str, tuple[str, str]]


def key(http: web.Request, name: str) -> Key:
    """What finds a stream again: nobody goes on with it under another path or key."""
    return name, http.path, given_keys(http)


class Plain:
    """How a stream ends that says so itself."""

    done = b""
    error = staticmethod(error_event)


class Kept:
    """One stream: its last events, who makes them, and who reads them."""

    def __init__(self, name: str, key: Key, grace: float, forget: Callable[[Kept], None]) -> None:
        """``forget`` is called when nobody has come back for ``grace`` seconds."""
        self.name, self.key = name, key
        self.over = False  # all events are there
        self.task: asyncio.Task[None] | None = None
        self._grace, self._forget = grace, forget
        self._events: deque[bytes] = deque()
        self._first = 1  # the number of the first that is kept
        self._sent = 0  # the number of the last that was written to a reader
        self._sent_bytes = self._unread_bytes = 0
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._reader = 0  # counts them: there is one at a time
        self._timer: asyncio.TimerHandle | None = None

    @property
    def last(self) -> int:
        """The number of the latest event."""
        return self._first + len(self._events) - 1

    async def fill(self, events: AsyncGenerator[bytes, None], framing: Framing) -> None:
        """Take in all events, and how they end."""
        try:
            async with aclosing(events):
                async for data in events:
                    await self._add(data)
        except Exception as error:
            log_failure(error)
            await self._add(framing.error(error))
        await self._add(framing.done)
        self.over = True
        self._news.set()

    async def _add(self, data: bytes) -> None:
        """Number the events in some bytes; comments have none, and are left out."""
        for event in data.split(b"\n\n"):
            if event and not event.startswith(b":"):
                numbered = b"id: %s:%d\n%s\n\n" % (self.name.encode(), self.last + 1, event)
                self._events.append(numbered)
                self._unread_bytes += len(numbered)
        self._news.set()
        while self._unread_bytes > UNREAD_BYTES:
            self._room.clear()
            await self._room.wait()

    def has(self, number: int) -> bool:
        """Whether all that follows an event is still there."""
        return self._first - 1 <= number <= self.last

    async def read(self, after: int) -> AsyncGenerator[bytes, None]:
        """All events behind a number. Whoever read before is shown out: its client is here."""
        self._reader += 1
        mine = self._reader
        self._news.set()
        if self._timer is not None:
            self._timer.cancel()
        try:
            yield KEEP_ALIVE  # so that the headers go out
            while mine == self._reader:
                if after < self.last:
                    data, after = self._some(after)
                    yield data
                    if mine == self._reader:
                        self._note_sent(after)
                elif self.over:
                    return
                else:
                    self._news.clear()
                    await self._news.wait()
        finally:
            if mine == self._reader:
                self._timer = asyncio.get_running_loop().call_later(self._grace, self.end)

    def _some(self, after: int) -> tuple[bytes, int]:
        """Events behind a number, as many as one write should have, and the last one's number."""
        pieces, size = [], 0
        while after < self.last and size < AT_ONCE:
            pieces.append(self._events[after + 1 - self._first])
            size += len(pieces[-1])
            after += 1
        return b"".join(pieces), after

    def _note_sent(self, number: int) -> None:
        for each in range(self._sent + 1, number + 1):
            size = len(self._events[each - self._first])
            self._unread_bytes -= size
            self._sent_bytes += size
        self._sent = max(self._sent, number)
        while self._sent_bytes > SENT_BYTES:
            self._sent_bytes -= len(self._events.popleft())
            self._first += 1
        self._room.set()

    def end(self) -> None:
        """Nobody came back."""
        if self.task is not None:
            self.task.cancel()
        self._forget(self)


class KeptStreams:
    """All streams that can be gone on with."""

    def __init__(self, grace: float) -> None:
        """``grace``: seconds that each waits for its client; 0 keeps none."""
        self._grace = grace
        self._streams: dict[Key, Kept] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def wants(self, http: web.Request, name: str) -> bool:
        """Whether a request's stream is to be kept, and may be: clients name their requests, and of
        two with one name the first is kept. One that is over makes room."""
        if (
            key(http, name) in self._streams
            or http.path not in PATHS
            or http.headers.get(WANTED, "").lower() not in ("1", "true")
        ):
            return False
        if len(self) >= MOST_STREAMS:
            over = next((kept for kept in self._streams.values() if kept.over), None)
            if over is not None:
                over.end()
        return self._grace > 0 and len(self) < MOST_STREAMS

    def keep(
        self,
        name: str,
        http: web.Request,
        events: AsyncGenerator[bytes, None],
        framing: Framing,
    ) -> Kept:
        """Begin a stream that goes on by itself."""
        kept = Kept(name, key(http, name), self._grace, self._forget)
        kept.task = asyncio.create_task(kept.fill(events, framing))
        self._streams[kept.key] = kept
        return kept

    def _forget(self, kept: Kept) -> None:
        self._streams.pop(kept.key, None)

    def find(self, http: web.Request) -> tuple[Kept, int]:
        """The stream that a request goes on with, and behind which number."""
        name, _, number = http.headers["Last-Event-ID"].rpartition(":")
        kept = self._streams.get(key(http, name))
        after = int(number) if number.isascii() and number.isdigit() and len(number) < 10 else -1
        if kept is None or not kept.has(after):
            raise StreamNotFoundError("There is no such stream to go on with, or no longer.")
        return kept, after

    async def close(self) -> None:
        """End them all."""
        tasks = [kept.task for kept in self._streams.values() if kept.task is not None]
        for kept in list(self._streams.values()):
            kept.end()
        await asyncio.gather(*tasks, return_exceptions=True)


KEPT = web.AppKey("kept", KeptStreams)


async def send_kept(
    http: web.Request, kept: Kept, after: int, headers: Mapping[str, str], interval: float
) -> web.StreamResponse:
    """Send what follows an event, and all that comes."""
    async with aclosing(kept.read(after)) as events:
        return await send_events(http, events, Plain(), headers, interval)


def is_resumed(http: web.Request) -> bool:
    """Whether a request wants to go on with a stream; then its body does not matter."""
    return http.method == "POST" and http.path in PATHS and "Last-Event-ID" in http.headers


async def resume(http: web.Request, interval: float) -> web.StreamResponse:
    """Go on with a stream."""
    kept, after = http.app[KEPT].find(http)
    return await send_kept(http, kept, after, {}, interval)
