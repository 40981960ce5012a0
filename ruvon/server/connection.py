"""Connections: how many, how long one may take over what, and what is said to those that are not
served: OpenAI's error, as everywhere else."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import IPv6Address, ip_address
from typing import Any, cast

import orjson
import structlog
from aiohttp import web

from ruvon.config import ServerConfig
from ruvon.errors import HeadTimeoutError, RequestError, TooManyConnectionsError
from ruvon.server.failures import failure, openai_error
from ruvon.server.keys import KEYS
from ruvon.server.middleware import error_response

log = structlog.get_logger(__name__)

LINGER = 2.0  # seconds in which a refused body is still read, so that its client reads the answer
HEAD_PATIENCE = 20.0  # seconds from the first byte of a request to the end of its headers
READ_PATIENCE = 60.0  # seconds in which a client must take something of what waits for it
MOST_REFUSED = 64  # connections that may linger beyond those that may be open
SWEEP = 2.0  # seconds between looks at all connections
NETWORK = 64  # bits of an IPv6 address that one customer has

OPTIONS: dict[str, Any] = {
    "access_log": None,
    "auto_decompress": False,  # ten megabytes may become ten gigabytes
    "lingering_time": LINGER,
}


class Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ("head_since",)

    head_since: float | None
    """Since when a request's headers have been coming that are not all there."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.head_since = None
        server = cast(Server, self._manager)
        refusal = server.refusal(transport)
        if refusal is None:
            super().connection_made(transport)
        else:
            self._force_close = True  # nothing that comes is looked at
            server.refuse(self, cast(asyncio.Transport, transport), refusal)

    def data_received(self, data: bytes) -> None:
        count = self._request_count
        super().data_received(data)
        if self._request_count != count:
            self.head_since = None
        elif data and self.head_since is None and not (self._request_in_progress or self._messages):
            self.head_since = self._loop.time()

    async def _handle_request(self, *request: Any) -> tuple[web.StreamResponse, bool]:
        """What came between a request's headers and this moment was its body."""
        self.head_since = None
        return await super()._handle_request(*request)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request that could not be parsed; the connection is closed after it."""
        if status >= 500:
            log.error("connection_failed", exc_info=exc)
            if request.writer.output_size:  # an answer has begun; all that is left is to break off
                raise ConnectionError
            response = error_response(exc if isinstance(exc, Exception) else RuntimeError(message))
        else:
            reason = (message or "").partition("\n")[0].rstrip(":.")[:200] or "not HTTP"
            log.info("malformed_request", status=status, reason=reason, remote=request.remote)
            error = RequestError(f"Malformed HTTP request: {reason}.", None, "malformed_request")
            response = error_response(error)
        response.headers["Server"] = "ruvon"
        response.force_close()
        return response


@dataclass(slots=True)
class Open:
    """What is known of an open connection besides: how much is not sent yet, and since when no
    less of it waits."""

    transport: asyncio.Transport
    address: str
    unsent: int = 0
    waits_since: float | None = None


class Server(web.Server):
    """Makes a `Connection` for each client, as many as there may be, and ends those that hold one
    without using it."""

    def __init__(self, made: web.Server, config: ServerConfig) -> None:
        super().__init__(
            made.request_handler, request_factory=made.request_factory, handler_cancellation=True
        )
        self.num_refused = 0
        self._config = config
        self._open: dict[web.RequestHandler, Open] = {}
        self._addresses: Counter[str] = Counter()
        self._refused: set[web.RequestHandler] = set()  # those that still read why

    def __call__(self) -> Connection:
        idle = self._config.keep_alive_timeout
        loop = asyncio.get_running_loop()
        return Connection(self, loop=loop, keepalive_timeout=idle, **OPTIONS)

    def __len__(self) -> int:
        return len(self._open)

    def refusal(self, transport: asyncio.BaseTransport) -> TooManyConnectionsError | None:
        """Why there is no room for another connection."""
        most, each = self._config.max_connections, self._config.max_connections_per_address
        address = address_of(transport)
        if len(self) >= most:
            reason = f"The server has all {most} connections open that it may have."
        elif each and address and self._addresses[address] >= each:
            reason = f"Your address has all {each} connections open that it may have."
        else:
            return None
        return TooManyConnectionsError(reason, retry_after=1.0)

    def refuse(
        self, handler: web.RequestHandler, transport: asyncio.Transport, why: Exception
    ) -> None:
        self.num_refused += 1
        linger = LINGER if len(self._refused) < MOST_REFUSED else 0
        self._refused.add(handler)
        turn_away(transport, why, linger)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._open[handler] = opened = Open(transport, address_of(transport))
        self._addresses[opened.address] += 1

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        super().connection_lost(handler, exc)
        self._refused.discard(handler)
        if (opened := self._open.pop(handler, None)) is not None:
            self._addresses[opened.address] -= 1
            if not self._addresses[opened.address]:
                del self._addresses[opened.address]

    async def watch(self) -> None:
        """Look at all connections now and then. One timer for them all costs less than each
        one's own."""
        while True:
            await asyncio.sleep(SWEEP)
            self.sweep(asyncio.get_running_loop().time())

    def sweep(self, now: float) -> None:
        for handler, opened in list(self._open.items()):
            connection = cast(Connection, handler)
            since = connection.head_since
            if since is not None and now - since > HEAD_PATIENCE:
                connection.head_since = None
                connection._force_close = True
                turn_away(opened.transport, HeadTimeoutError(HEAD_PATIENCE), LINGER)
            elif takes_nothing(opened, connection.writing_paused, now):
                log.info("reader_stuck", address=opened.address, unsent=opened.unsent)
                opened.transport.abort()


def takes_nothing(opened: Open, is_paused: bool, now: float) -> bool:
    """Whether a client has read nothing for too long, though everybody waits for that: nothing is
    added to what it has to read."""
    unsent = opened.transport.get_write_buffer_size()
    waiting = unsent > 0 and (is_paused or opened.transport.is_closing())
    if not waiting or unsent < opened.unsent or opened.waits_since is None:
        opened.waits_since = now if waiting else None
    opened.unsent = unsent
    return opened.waits_since is not None and now - opened.waits_since > READ_PATIENCE


def address_of(transport: asyncio.BaseTransport) -> str:
    """Whom a connection counts for: an address, of IPv6 its network. "" for this machine's own
    clients, which are a proxy's as a rule."""
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return ""
    address = ip_address(str(peer[0]).partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return ""
    if isinstance(address, IPv6Address):
        return str(IPv6Address(int(address) >> NETWORK << NETWORK))
    return str(address)


def turn_away(transport: asyncio.Transport, error: Exception, linger: float) -> None:
    """Say why, and close after ``linger`` seconds. What still comes would else make the client's
    kernel throw away what was said."""
    body, status = orjson.dumps(openai_error(error)), HTTPStatus(failure(error).status)
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\nServer: ruvon\r\n"
    )
    if isinstance(error, TooManyConnectionsError):
        head += "Retry-After: 1\r\n"
    transport.write(f"{head}\r\n".encode() + body)
    if linger and transport.can_write_eof():
        transport.write_eof()
        asyncio.get_running_loop().call_later(linger, transport.abort)
    else:
        transport.close()


class Runner(web.AppRunner):
    """Runs an application behind such a server, which ``made`` is told of."""

    def __init__(
        self,
        app: web.Application,
        config: ServerConfig,
        made: Callable[[Server], None],
        **options: Any,
    ) -> None:
        super().__init__(app, **options)
        self._config = config
        self._made = made

    async def _make_server(self) -> Server:
        server = Server(await super()._make_server(), self._config)
        self._made(server)
        self._watch = asyncio.create_task(server.watch())
        return server

    async def cleanup(self) -> None:
        await super().cleanup()
        self._watch.cancel()


async def expect(http: web.Request) -> None:
    """``Expect: 100-continue``: ask for the body, unless its handler will refuse it at once."""
    small = (http.content_length or 0) <= http.client_max_size
    if http.version >= (1, 1) and small and is_allowed(http):
        with suppress(ConnectionError):  # it has left: its handler will hear of that
            await http.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        http.writer.output_size = 0  # as aiohttp does: the response has not begun


def is_allowed(http: web.Request) -> bool:
    try:
        http.app[KEYS].check(http)
    except RequestError:
        return False
    return True
