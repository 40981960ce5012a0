"""Speaks HTTP with the server under examination. Equal requests are made once: many checks look at
the same answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import aiohttp
import orjson
from yarl import URL

from ruvon.doctor.expect import Failed, brief


@dataclass(frozen=True)
class Frame:
    """One server-sent event: what stands between two empty lines. A comment has neither field."""

    raw: bytes
    event: str | None = None
    data: str | None = None


@dataclass(frozen=True)
class Reply:
    """A response that was read to its end."""

    request: str  # method and path
    status: int
    headers: Mapping[str, str]  # any case
    body: bytes
    seconds: float = 0.0
    arrivals: tuple[float, ...] = ()  # seconds after the request when pieces of the body came

    @cached_property
    def json(self) -> Any:
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            came = brief(self.body.decode(errors="replace")) or "an empty body"
            raise Failed(f"{self.request}: {self.status}, expected JSON; got {came}") from None

    @cached_property
    def frames(self) -> list[Frame]:
        """The body as server-sent events."""
        blocks = self.body.replace(b"\r\n", b"\n").split(b"\n\n")
        return [parse_frame(block) for block in blocks if block.strip()]


def parse_frame(block: bytes) -> Frame:
    """Lines ``field: value``; several lines of data are joined, as the standard says."""
    event, data = None, []
    for line in block.decode(errors="replace").split("\n"):
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            event = value
        elif name == "data":
            data.append(value)
    return Frame(block, event, "\n".join(data) if data else None)


@dataclass
class Probe:
    """``url`` is the server's root, without ``/v1``. ``model`` is asked in every request."""

    session: aiohttp.ClientSession
    url: str
    model: str = ""
    api_key: str | None = None
    asked: dict[object, asyncio.Task[Reply]] = field(default_factory=dict)

    async def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        *,
        again: int = 0,
    ) -> Reply:
        """The reply to a request; ``again`` tells apart requests that are otherwise equal."""
        data = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
        headers = dict(headers or {})
        key = (method, path, data, tuple(headers.items()), again)
        if key not in self.asked:
            self.asked[key] = asyncio.create_task(self.fetch(method, path, data, headers))
        return await asyncio.shield(self.asked[key])

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        return await self.ask("GET", path, None, headers)

    async def post(
        self, path: str, body: object, headers: Mapping[str, str] | None = None, *, again: int = 0
    ) -> Reply:
        return await self.ask("POST", path, body, headers, again=again)

    async def fetch(self, method: str, path: str, data: bytes, headers: Mapping[str, str]) -> Reply:
        """Make a request now. A header of value "" is not sent."""
        begun = time.monotonic()
        arrivals = []
        async with self.open(method, path, data, headers) as response:
            pieces = []
            async for piece in response.content.iter_any():
                arrivals.append(time.monotonic() - begun)
                pieces.append(piece)
        return Reply(
            f"{method} {path}",
            response.status,
            response.headers,
            b"".join(pieces),
            time.monotonic() - begun,
            tuple(arrivals),
        )

    def open(
        self, method: str, path: str, data: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Any:
        """The request as a context with aiohttp's response, for checks that do not read on."""
        given = {"Content-Type": "application/json"} if data else {}
        if self.api_key:
            given["Authorization"] = f"Bearer {self.api_key}"
        given |= headers or {}
        given = {name: value for name, value in given.items() if value}
        url = URL(self.url + path, encoded=True)
        return self.session.request(
            method, url, data=data or None, headers=given, allow_redirects=False
        )

    async def raw(self, data: bytes, seconds: float = 5.0) -> bytes:
        """What comes back for these bytes until the server closes, at most so long."""
        url = URL(self.url)
        secure = True if url.scheme == "https" else None
        reader, writer = await asyncio.open_connection(url.host, url.port, ssl=secure)
        came = b""
        try:
            writer.write(data)
            async with asyncio.timeout(seconds):
                while piece := await reader.read(65536):
                    came += piece
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()
        return came

    async def close(self) -> None:
        """Leave no request behind."""
        for task in self.asked.values():
            task.cancel()
        await asyncio.gather(*self.asked.values(), return_exceptions=True)
