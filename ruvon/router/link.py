"""The other side of a router: one connection to a replica, one request at a time.

A protocol of its own, not aiohttp's client: a token that a replica sends is a read, a look for the
end and a write, with no task woken in between. `bench/router.py` measures it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import cast

from ruvon.router.framing import MOST_HEAD, Body, FramingError, Head, Unsized, body_of, parse_head

MOST_UNREAD = 262_144  # bytes of a body that nobody has asked for yet, before reading pauses


class LostError(ConnectionError):
    """The connection ended before the answer did. ``begun``: some of the answer had come."""

    def __init__(self, why: str, *, begun: bool) -> None:
        super().__init__(why)
        self.begun = begun


class Link(asyncio.Protocol):
    """A connection. ``ask``, then ``collect`` or ``relay``; when that is over it can be used
    again, if `reusable`."""

    def __init__(self) -> None:
        self.body: Body | None = None  # of the answer under way
        self.used = False  # has carried an answer before
        self._transport: asyncio.Transport | None = None
        self._lost: Exception | None = None
        self._method = ""
        self._buffer = b""  # of a head
        self._unread: list[bytes] = []  # of a body
        self._num_unread = 0
        self._head: asyncio.Future[Head] | None = None
        self._keeps_open = False
        self._sink: Callable[[bytes], bool] | None = None
        self._paused = False
        self._news = asyncio.Event()

    # ---------------------------------------------------------------- what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            if self.body is None:
                data = self._feed_head(data)
            if self.body is not None and (data or self.body.done):
                self._feed_body(self.body, data)
        except FramingError as error:
            self._end(error)
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionResetError("the replica closed the connection"))

    # ---------------------------------------------------------------- an answer

    def _feed_head(self, data: bytes) -> bytes:
        """Take what belongs to the head; gives what follows it."""
        if self._head is None:
            raise FramingError("an answer to nothing")
        self._buffer += data
        while True:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                if len(self._buffer) > MOST_HEAD:
                    raise FramingError("a head without end")
                return b""
            head, rest = parse_head(self._buffer[:end]), self._buffer[end + 4 :]
            self._buffer = b"" if head.status >= 200 else rest
            if head.status >= 200:  # else it announces the answer
                break
        self._keeps_open = head.keeps_open
        self.body = body_of(self._method, head)
        if not self._head.done():
            self._head.set_result(head)
        return rest

    def _feed_body(self, body: Body, data: bytes) -> None:
        passed = body.feed(data)
        if self._sink is None:
            self._keep(passed)
        elif passed and not self._sink(passed):
            self._pause()
        if body.done or self._sink is None:
            self._news.set()

    def _keep(self, data: bytes) -> None:
        self._unread.append(data)
        self._num_unread += len(data)
        if self._num_unread > MOST_UNREAD:
            self._pause()

    def _pause(self) -> None:
        assert self._transport is not None
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._news.set()

    def _end(self, error: Exception) -> None:
        """Nothing comes any more. A body without size ends so."""
        self._lost = error
        if isinstance(self.body, Unsized):
            self.body.done = True
        if self._head is not None and not self._head.done():
            self._head.set_exception(LostError(str(error), begun=bool(self._buffer)))
        self._news.set()

    # ---------------------------------------------------------------- what the router calls

    @property
    def reusable(self) -> bool:
        """Whether another request may go this way."""
        idle = self._head is None or (self.body is not None and self.body.done)
        return idle and self._lost is None and (self._keeps_open or not self.used)

    async def ask(self, method: str, request: bytes) -> Head:
        """Send a request, and wait for the head of the answer. Raises LostError."""
        if self._lost is not None or self._transport is None:
            raise LostError("the connection had ended", begun=False)
        self.used, self.body, self._method = True, None, method
        self._sink = None
        self._unread.clear()
        self._num_unread = 0
        self._head = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._head

    async def collect(self, most: int) -> bytes:
        """The body as it is framed, or as much of it as goes beyond ``most`` bytes: `Body.done`
        tells. Raises LostError if the connection ends before."""
        body = self.body
        assert body is not None
        while not body.done and self._num_unread <= most:
            self._check()
            self._resume()
            await self._wait()
        data, self._unread, self._num_unread = b"".join(self._unread), [], 0
        return data

    async def relay(
        self, sink: Callable[[bytes], bool], drain: Callable[[], Awaitable[None]]
    ) -> None:
        """Give every piece of the body to ``sink`` as it comes. Where that says False, nothing is
        read until ``drain`` is over. Raises LostError if the connection ends before the body."""
        body = self.body
        assert body is not None
        self._sink = sink
        if self._unread and not sink(b"".join(self._unread)):
            self._pause()
        while not body.done:
            self._check()
            if self._paused:
                await drain()
                self._resume()
            await self._wait()

    def _check(self) -> None:
        if self._lost is not None:
            raise LostError(str(self._lost), begun=True)

    async def _wait(self) -> None:
        await self._news.wait()
        self._news.clear()

    def _resume(self) -> None:
        if self._paused and self._lost is None:
            assert self._transport is not None
            self._paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """End the connection at once: the replica notices, and ends what it computes for it."""
        if self._transport is not None:
            self._transport.abort()
