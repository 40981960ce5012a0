"""Clients of all manners: patient, slow, gone too early, and such that speak no HTTP at all."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from random import Random
from typing import Any, TypeAlias, TypeVar

import aiohttp
from drawn import Case
from folding import fold, is_complete
from wire import connected, head, parse

T = TypeVar("T")

PATIENCE = 240.0  # seconds after which an answer counts as lost, unless the machine is that slow
TURNS = 3  # answers for each client that others may have meanwhile
CODES = (
    b"generation_failed", b"engine_dead", b"replica_lost", b"not_ready", b"queue_full",
    b"shutting_down", b"deadline_exceeded", b"unavailable", b"request_timeout",
)  # fmt: skip
SENTENCES: Mapping[bytes, str] = {
    b"The step that computed it failed": "generation_failed",
    b"NaN in the logits": "generation_failed",
    b"The engine has failed": "engine_dead",
    b"shutting down": "shutting_down",
    b"The model is still loading": "not_ready",
    b"No replica can answer now": "not_ready",
    b"time is up": "deadline_exceeded",
    b"time was up": "deadline_exceeded",
}
"""How an error is known where an API has no codes (Ollama's)."""


@dataclass(frozen=True, slots=True)
class Odd:
    """An answer that is not the one a request gets alone, and all that may excuse it."""

    request_id: str
    case: Case
    manner: str
    what: str  # a code, "different", "cut", "unanswered", "silence"
    detail: str
    began: float
    ended: float
    sending: float = 0.0  # seconds that its client took to send it, as far as that may be long


@dataclass
class Storm:
    """What all clients share."""

    seed: str
    port: int
    session: aiohttp.ClientSession
    cases: Sequence[Case]
    alone: Sequence[tuple[int, bytes]]  # the status and the digest of what each gets alone
    over: bool = False
    clients: int = 1
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # kind or manner, outcome
    odd: list[Odd] = field(default_factory=list)

    async def client(self, number: int) -> None:
        """Asks for something new as soon as it has been answered."""
        rng = Random(f"{self.seed} client {number}")
        manners = [manner for manner, _ in MANNERS]
        weights = [weight for _, weight in MANNERS]
        turn = 0
        while not self.over:
            (manner,) = rng.choices(manners, weights)
            await manner(self, rng, f"c{number}-{turn}")
            turn += 1

    async def await_answer(self, asking: Coroutine[Any, Any, T]) -> T:
        """Raises TimeoutError if none comes though nobody has been answered for as long, or others
        have all been served several times. A server that goes on slowly is waited for."""
        task = asyncio.ensure_future(asking)
        while True:
            before = self.counts["valid", "as alone"]
            done, _ = await asyncio.wait([task], timeout=PATIENCE)
            if done:
                return task.result()
            if not 0 < self.counts["valid", "as alone"] - before < TURNS * self.clients:
                task.cancel()
                await asyncio.wait([task])
                raise TimeoutError

    def draw(self, rng: Random, *, stream: bool = False) -> int:
        """The number of a request."""
        while True:
            number = rng.randrange(len(self.cases))
            if not stream or self.cases[number].stream:
                return number

    def judge(
        self,
        number: int,
        manner: str,
        request_id: str,
        began: float,
        status: int,
        body: bytes,
        sending: float = 0.0,
    ) -> None:
        """Count an answer, and keep it if it is not as it should be."""
        case, (alone_status, alone) = self.cases[number], self.alone[number]
        what = detail = ""
        try:
            whole = not case.stream or status != 200 or is_complete(body)
            digest = fold(case.stream and status == 200, body)
        except ValueError:
            whole, digest = False, b""
        if not (whole and (status, digest) == (alone_status, alone)):
            what = error_code(body) or ("different" if whole else "cut")
            detail = f"{status}, not {alone_status}: {body[-300:]!r}"
            self.note(request_id, number, manner, what, detail, began, sending)
        self.counts[case.kind, what or "as alone"] += 1

    def note(
        self,
        request_id: str,
        number: int,
        manner: str,
        what: str,
        detail: str,
        began: float,
        sending: float = 0.0,
    ) -> None:
        case, now = self.cases[number], time.monotonic()
        self.odd.append(Odd(request_id, case, manner, what, detail, began, now, sending))


def error_code(body: bytes) -> str:
    """The code of the error that a body tells of, if it does."""
    end = body[-2000:]
    if b"error" not in end:
        return ""
    found = next((code.decode() for code in CODES if b'"%s"' % code in end), "")
    return found or next((code for text, code in SENTENCES.items() if text in end), "")


# ------------------------------------------------------------------------------ those that wait


async def patient(storm: Storm, rng: Random, request_id: str) -> None:
    """Sends a request and reads the answer."""
    await exchange(storm, storm.draw(rng), "patient", request_id)


async def exchange(
    storm: Storm,
    number: int,
    manner: str,
    request_id: str,
    more: Mapping[str, str] | None = None,
) -> None:
    case, began = storm.cases[number], time.monotonic()
    headers = {"X-Request-Id": request_id, "Content-Type": "application/json", **(more or {})}
    url = f"http://127.0.0.1:{storm.port}{case.path}"

    async def ask() -> tuple[int, bytes]:
        data, limit = BytesIO(case.body), aiohttp.ClientTimeout(None)
        async with storm.session.post(url, data=data, headers=headers, timeout=limit) as reply:
            return reply.status, await reply.read()

    try:
        status, body = await storm.await_answer(ask())
    except TimeoutError:
        storm.counts[case.kind, "silence"] += 1
        storm.note(request_id, number, manner, "silence", "", began)
    except (aiohttp.ClientError, OSError) as error:
        what = "cut" if isinstance(error, aiohttp.ClientPayloadError) else "unanswered"
        storm.counts[case.kind, what] += 1
        storm.note(request_id, number, manner, what, repr(error), began)
        await asyncio.sleep(0.2)
    else:
        storm.judge(number, manner, request_id, began, status, body)
        if status == 503:
            await asyncio.sleep(0.2)


async def hurried(storm: Storm, rng: Random, request_id: str) -> None:
    """Says how long it may take, which is too short."""
    more = {"X-Request-Timeout": rng.choice(["0.001", "0.05", "0.5"])}
    await exchange(storm, storm.draw(rng), "hurried", request_id, more)


async def slow(storm: Storm, rng: Random, request_id: str) -> None:
    """Sends in pieces, and reads in pieces, with rests in between."""
    number = storm.draw(rng)
    case, began = storm.cases[number], time.monotonic()
    if len(case.body) > 10_000:
        return
    told = Told()
    try:
        await storm.await_answer(
            trickle(storm.port, head(case, request_id, CLOSE) + case.body, rng, told)
        )
        status, body = parse(told.data)
    except TimeoutError:
        storm.counts[case.kind, "silence"] += 1
        storm.note(request_id, number, "slow", "silence", "", began)
    except (OSError, ValueError) as error:
        what = "cut" if told.data else "unanswered"
        storm.counts[case.kind, what] += 1
        storm.note(request_id, number, "slow", what, repr(error), began, told.sending)
        await asyncio.sleep(0.2)
    else:
        storm.judge(number, "slow", request_id, began, status, body, told.sending)


@dataclass(slots=True)
class Told:
    """How far a slow client has come."""

    data: bytes = b""
    sending: float = 0.0  # seconds from the first piece to the last


async def trickle(port: int, whole: bytes, rng: Random, told: Told) -> None:
    """Send a few pieces, read many. Raises ConnectionError where nothing comes."""
    async with connected(port) as (reader, writer):
        step, first = max(len(whole) // 4, 1), time.monotonic()
        for at in range(0, len(whole), step):
            writer.write(whole[at : at + step])
            told.sending = time.monotonic() - first
            await asyncio.sleep(rng.random() * 0.1)
        while piece := await reader.read(rng.choice([1, 100, 5000])):
            told.data += piece
            if len(told.data) < 300:
                await asyncio.sleep(rng.random() * 0.05)
        if not told.data:
            raise ConnectionError("closed without an answer")


# ------------------------------------------------------------------------------ those that leave


async def leaving(storm: Storm, rng: Random, request_id: str) -> None:
    """Asks, and is gone before the answer, or amid it."""
    case = storm.cases[storm.draw(rng)]
    wait = rng.choice([0, 0.005, 0.05, 0.3]) * rng.random()
    await throw(storm, [head(case, request_id) + case.body], wait, "gone early", rng)


async def half(storm: Storm, rng: Random, request_id: str) -> None:
    """Sends half a request."""
    case = storm.cases[storm.draw(rng)]
    whole = head(case, request_id) + case.body
    piece = whole[: rng.randrange(min(len(whole), 20_000))]
    await throw(storm, [piece], rng.random() * 0.3, "half a request", rng)


async def deaf(storm: Storm, rng: Random, request_id: str) -> None:
    """Asks for long streams, one behind the other on one connection, and never reads."""
    cases = [storm.cases[storm.draw(rng, stream=True)] for _ in range(3)]
    whole = b"".join(head(case, f"{request_id}.{n}") + case.body for n, case in enumerate(cases))
    await throw(storm, [whole], 1.0, "never reads", rng, buffer=2048)


async def hostile(storm: Storm, rng: Random, request_id: str) -> None:
    """Sends what is no HTTP, or nearly."""
    await throw(storm, rng.choice(NONSENSE), rng.random() * 0.2, "hostile", rng, reads=True)


async def throw(
    storm: Storm,
    pieces: Sequence[bytes],
    wait: float,
    name: str,
    rng: Random,
    *,
    buffer: int = 0,
    reads: bool = False,
) -> None:
    """Send, wait, and break the connection off. What answer comes is of interest only if it
    ``reads``: it must be a refusal."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(10), connected(storm.port, buffer) as (reader, writer):
            for piece in pieces:
                writer.write(piece)
                await asyncio.sleep(wait / len(pieces))
            data = await reader.read(4096) if reads else b""
            if rng.random() < 0.5:
                linger = struct.pack("ii", 1, 0)  # a reset in place of an orderly end
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger
                )
    except (OSError, TimeoutError) as error:
        storm.counts[name, type(error).__name__] += 1
        await asyncio.sleep(0.2)
        return
    data = data.removeprefix(CONTINUE)
    refused = data[9:10] == b"4" or data[9:12] == b"503" or not data
    what = "sent" if not reads else "refused" if refused else error_code(data) or "different"
    storm.counts[name, what] += 1
    if reads and not refused:
        case, now = Case(name, "", b"".join(pieces)), time.monotonic()
        storm.odd.append(Odd("", case, name, what, repr(data[-300:]), began, now))


CLOSE = "Connection: close\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
GET = b"GET /ready HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
NONSENSE: Sequence[Sequence[bytes]] = (
    [b"nonsense\r\n\r\n"],
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200))],
    [bytes(100)],
    [b"GET / HTTP/9.9\r\n\r\n"],
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    [b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n"],
    [b"GET /%00%ff HTTP/1.1\r\nHost: x\r\n\r\n"],
    [GET + b"no colon\r\n\r\n"],
    [GET + b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n"],
    [GET + b"X-Many: x\r\n" * 2000 + b"\r\n"],
    [GET, *[b"X-Slow: x\r\n"] * 20, b"no colon\r\n\r\n"],
    [POST + b"Content-Length: many\r\n\r\n{}"],
    [POST + b"Content-Length: -5\r\n\r\n{}"],
    [POST + b"Content-Length: 8589934592\r\n\r\n", b"{"],
    [POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}"],
    [POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}"],
    [POST + b"Transfer-Encoding: chunked\r\n\r\nnot hex\r\n"],
    [POST + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\x00"],
    [POST + b"Expect: the-spanish-inquisition\r\nContent-Length: 2\r\n\r\n{}"],
    [POST + b"Content-Length: 6000000\r\n\r\n", *[b"x" * 100_000] * 3],
)  # fmt: skip


Manner: TypeAlias = Callable[[Storm, Random, str], Awaitable[None]]

MANNERS: Sequence[tuple[Manner, int]] = (
    (patient, 60), (slow, 8), (leaving, 14), (half, 5), (deaf, 3), (hostile, 8), (hurried, 2),
)  # fmt: skip
