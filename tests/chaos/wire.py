"""HTTP as clients write it that have no library: connections, heads, and answers taken apart."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

from drawn import Case


class connected:
    """A connection as ``(reader, writer)``; ``buffer`` is what its socket takes in."""

    def __init__(self, port: int, buffer: int = 0) -> None:
        self._port, self._buffer = port, buffer

    async def __aenter__(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        end = socket.socket()
        end.setblocking(False)
        if self._buffer:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)
        try:
            await asyncio.get_running_loop().sock_connect(end, ("127.0.0.1", self._port))
        except BaseException:
            end.close()
            raise
        limit = self._buffer or 1 << 16
        reader, self._writer = await asyncio.open_connection(sock=end, limit=limit)
        return reader, self._writer

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


def head(case: Case, request_id: str, more: str = "") -> bytes:
    return (
        f"POST {case.path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: {request_id}\r\n{more}"
        f"Content-Type: application/json\r\nContent-Length: {len(case.body)}\r\n\r\n"
    ).encode()


def parse(data: bytes) -> tuple[int, bytes]:
    """A response that ended with its connection: status and body. Raises ValueError if it is not
    whole."""
    top, _, body = data.partition(b"\r\n\r\n")
    lines = top.split(b"\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (one.partition(b":") for one in lines[1:])
    }
    if headers.get(b"transfer-encoding") == b"chunked":
        body = unchunked(body)
    elif len(body) != int(headers[b"content-length"]):
        raise ValueError("a body that is not whole")
    return int(lines[0].split()[1]), body


def unchunked(data: bytes) -> bytes:
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        if len(data) < length + 2:
            raise ValueError("a chunk that is not whole")
        if not length:
            return body
        body, data = body + data[:length], data[length + 2 :]
