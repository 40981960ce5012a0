"""One replica as a router knows it: where it is, how it is, and what it is believed to hold."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import orjson

from ruvon.errors import ConfigError
from ruvon.router.framing import Head, payload
from ruvon.router.link import Link, LostError
from ruvon.router.prefixes import PIECE, Prefixes

CONNECT_TIMEOUT = 5.0  # seconds
POLL_TIMEOUT = 5.0  # seconds
IDLE = 20.0  # seconds after which a connection is not used again: the replica may close it
MOST_IDLE = 256  # connections kept
MOST_REPORT = 16 << 20  # bytes of what is read of a replica beside answers: its metrics
BYTES_PER_TOKEN = 4.0  # before a replica has told

Status: TypeAlias = Literal["starting", "ready", "draining", "down", "dead"]
"""``down`` does not answer, ``dead`` says that it will never again."""


class Address(NamedTuple):
    """Where a replica listens: ``host`` and ``port``, or ``path`` of a Unix socket."""

    host: str
    port: int
    path: str | None = None
    tls: bool = False


def parse_url(url: str) -> Address:
    """``http://host:8000``, ``https://host`` or ``unix:/path``. Raises ConfigError."""
    if url.startswith("unix:") and len(url) > 5:
        return Address("localhost", 0, url.removeprefix("unix:").removeprefix("//"))
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError(f"{url!r} is no URL of a replica") from None
    plain = not (parts.query or parts.fragment or parts.username or parts.path.strip("/"))
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ConfigError(
            f"{url!r} is no URL of a replica; write it like http://host:8000 or unix:/path"
        )
    tls = parts.scheme == "https"
    return Address(parts.hostname, port or (443 if tls else 80), tls=tls)


@dataclass(slots=True, eq=False)
class Replica:
    """A replica's state. Everything happens on the event loop's thread."""

    name: str  # how metrics and logs call it
    url: str
    prefixes: Prefixes
    status: Status = "starting"
    held_back: bool = False  # by whoever wants it drained: gets nothing new
    epoch: str = ""  # changes when what it had cached is gone
    in_flight: int = 0  # requests from here
    others: int = 0  # what it says it has beyond those: from other routers and clients
    num_missed: int = 0  # polls without an answer, in a row
    told: Mapping[str, Any] = field(default_factory=dict)  # its last report
    bytes_per_token: float = BYTES_PER_TOKEN
    links: set[Link] = field(default_factory=set)  # in use
    _idle: list[tuple[float, Link]] = field(default_factory=list)
    _num_evicted: int = 0  # tokens, as it last said
    _process: str = ""  # the one that has said so
    _spent: Mapping[str, int] = field(default_factory=dict)  # tokens by account, until `take_spent`

    @property
    def load(self) -> int:
        """Requests that it has and that have not ended."""
        return self.in_flight + self.others

    @property
    def open(self) -> bool:
        """Whether it may get new requests."""
        return self.status == "ready" and not self.held_back

    # ---------------------------------------------------------------- what it says

    def hear(self, report: Mapping[str, Any]) -> None:
        """Take in what ``/load`` says: how it is, what it has to do, what it has forgotten."""
        self.told = report
        self.num_missed = 0
        said = report.get("status")
        self.status = said if said in ("ready", "draining", "dead") else "starting"
        busy = int(report.get("running", 0)) + int(report.get("waiting", 0))
        self.others = max(busy - self.in_flight, 0)
        evicted = int(report.get("evicted_tokens", 0))
        if (epoch := str(report.get("epoch", ""))) != self.epoch:
            self.epoch = epoch
            self.prefixes.clear()
        elif evicted > self._num_evicted:
            tokens = evicted - self._num_evicted
            self.prefixes.forget(int(tokens * self.bytes_per_token / PIECE))
        self._num_evicted = evicted

    def take_spent(self) -> dict[str, int]:
        """Tokens by account that it has told of since the last call."""
        if "spent" not in self.told:
            return {}
        process, totals = self.epoch.partition("-")[0], self.told["spent"]
        before = self._spent if process == self._process else {}
        self._process, self._spent = process, totals
        return {account: total - before.get(account, 0) for account, total in totals.items()}

    def learn_size(self, num_bytes: int, num_tokens: int) -> None:
        """A prompt had so many tokens: how many bytes a token takes, on average."""
        if num_tokens > 0 and num_bytes > 0:
            self.bytes_per_token += 0.05 * (num_bytes / num_tokens - self.bytes_per_token)

    def lose(self) -> None:
        """It is gone: whoever waits for it is told so at once."""
        self.status = "down"
        self.others = 0
        if not self.epoch:  # it will not tell whether it began anew
            self.prefixes.clear()
        for link in list(self.links):
            link.abort()
        while self._idle:
            self._idle.pop()[1].abort()

    # ---------------------------------------------------------------- connections

    async def connect(self) -> Link:
        """A connection that nobody uses, or a new one. Raises LostError."""
        newest = time.monotonic() - IDLE
        while self._idle:
            since, link = self._idle.pop()
            if link.reusable and since > newest:
                self.links.add(link)
                return link
            link.abort()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                link = await self._connect()
        except (OSError, TimeoutError) as error:
            raise LostError(f"{self.url}: {error or 'timed out'}", begun=False) from error
        self.links.add(link)
        return link

    async def _connect(self) -> Link:
        loop, address = asyncio.get_running_loop(), parse_url(self.url)
        if address.path is not None:
            return (await loop.create_unix_connection(Link, address.path))[1]
        tls = ssl.create_default_context() if address.tls else None
        return (await loop.create_connection(Link, address.host, address.port, ssl=tls))[1]

    def release(self, link: Link) -> None:
        """Whoever had a connection is done with it; one in mid-answer ends, and so does what is
        computed for it."""
        self.links.discard(link)
        if link.reusable and len(self._idle) < MOST_IDLE:
            self._idle.append((time.monotonic(), link))
        else:
            link.abort()

    async def ask(self, method: str, request: bytes) -> tuple[Link, Head]:
        """Send a request over a connection of its own, and get the head of the answer. Where an
        idle connection turns out to have ended, another one is made. Raises LostError."""
        while True:
            link = await self.connect()
            reused = link.used
            try:
                return link, await link.ask(method, request)
            except LostError as error:
                self.release(link)
                if not reused or error.begun or self.status == "down":
                    raise
            except BaseException:
                link.abort()
                self.release(link)
                raise

    async def get(self, path: str, key: str | None = None) -> tuple[Head, bytes]:
        """A small question of the router's own. Raises LostError, also when it takes too long."""
        auth = f"Authorization: Bearer {key}\r\n" if key else ""
        request = f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n{auth}\r\n".encode()
        try:
            async with asyncio.timeout(POLL_TIMEOUT):
                link, head = await self.ask("GET", request)
                try:
                    data = await link.collect(MOST_REPORT)
                finally:
                    self.release(link)
        except TimeoutError:
            raise LostError(f"{self.url}: no answer to {path}", begun=False) from None
        assert link.body is not None
        return head, payload(data) if link.body.chunked else data

    @property
    def host(self) -> str:
        """For a request's header."""
        address = parse_url(self.url)
        return f"[{address.host}]" if ":" in address.host else address.host


async def poll(replica: Replica, key: str | None) -> None:
    """See how a replica is. A server that knows no ``/load``, or has other keys, still says
    whether it is ready, and with that its load is what was sent to it from here."""
    try:
        for path in ("/load", "/ready", "/health"):
            head, body = await replica.get(path, key)
            if path == "/load" and head.status in (200, 503):
                replica.hear(orjson.loads(body))
                return
            if head.status not in (401, 403, 404, 405):
                break
        replica.hear({"status": "ready" if head.status == 200 else "starting"})
    except (LostError, orjson.JSONDecodeError, TypeError, ValueError):
        replica.num_missed += 1
