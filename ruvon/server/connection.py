"""What a connection says to what is no HTTP request: OpenAI's error, as everywhere else."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from aiohttp import web

from ruvon.errors import RequestError
from ruvon.server.keys import KEYS
from ruvon.server.middleware import error_response

log = structlog.get_logger(__name__)

LINGER = 2.0  # seconds in which a refused body is still read, so that its client reads the answer

OPTIONS: dict[str, Any] = {
    "access_log": None,
    "auto_decompress": False,  # ten megabytes may become ten gigabytes
    "lingering_time": LINGER,
}


class Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ()

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
            reason = (message or "").partition("\n")[0].rstrip(":")[:200] or "not HTTP"
            log.info("malformed_request", status=status, reason=reason, remote=request.remote)
            error = RequestError(f"Malformed HTTP request: {reason}.", None, "malformed_request")
            response = error_response(error)
        response.headers["Server"] = "ruvon"
        response.force_close()
        return response


class Server(web.Server):
    """Makes a `Connection` for each client."""

    def __call__(self) -> Connection:
        return Connection(self, loop=asyncio.get_running_loop(), **OPTIONS)


class Runner(web.AppRunner):
    """Runs an application behind such a server."""

    async def _make_server(self) -> Server:
        made = await super()._make_server()
        return Server(
            made.request_handler, request_factory=made.request_factory, handler_cancellation=True
        )


async def expect(http: web.Request) -> None:
    """``Expect: 100-continue``: ask for the body, unless its handler will refuse it at once."""
    small = (http.content_length or 0) <= http.client_max_size
    if http.version >= (1, 1) and small and http.app[KEYS].find(http) is not None:
        await http.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        http.writer.output_size = 0  # as aiohttp does: the response has not begun
