"""What a router adds: to the first token, and in processor time for each token that it passes on.

    python bench/router.py [--streams 400] [--rate 100] [--tokens 256] [--seconds 8]

The replicas are scripted: one process of raw sockets that answers at once and then sends an event
to every stream each ``1 / rate`` seconds, as a model's steps do; where it is late, it sends all
that are due, for a model would not wait for a router. The clients are raw sockets too, in this
process. All three share the machine's cores, so what each of them works is told as well, and what
the router could carry with a core of its own. ``gap``: seconds between two reads of a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import uvloop
from measure import machine, write
from process import free_port, running

EVENT = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk",'
    b'"created":1764200000,"model":"fake","system_fingerprint":"fp_0","choices":[{"index":0,'
    b'"delta":{"content":" word"},"logprobs":null,"finish_reason":null}]}\n\n'
)
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
LAST = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"X-Ruvon-Prompt-Tokens: 100\r\nX-Ruvon-Cached-Tokens: 0\r\n\r\n"
)
LOAD = b'{"status":"ready","epoch":"0","running":0,"waiting":0}'
ROUNDS, REQUESTS = 4, 500
BODY = json.dumps(
    {"messages": [{"role": "user", "content": "word " * 200}], "stream": True, "max_tokens": 64}
).encode()


class Replica(asyncio.Protocol):
    """A scripted replica's connection. How many tokens are wanted comes as ``X-Tokens``."""

    def __init__(self, streams: dict[Replica, int]) -> None:
        self.streams = streams
        self.data = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.streams.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        length = int(header(head, b"content-length") or 0)
        if not found or len(body) < length:
            return
        self.data = b""
        if head.startswith(b"GET"):
            start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "
            self.transport.write(start + b"%d\r\n\r\n" % len(LOAD) + LOAD)
            return
        tokens = int(header(head, b"x-tokens") or 1)
        if tokens == 1:
            self.transport.write(HEAD + CHUNK + LAST)
        else:
            self.transport.write(HEAD + CHUNK)
            self.streams[self] = tokens - 1


def header(head: bytes, name: bytes) -> bytes:
    return head.lower().partition(b"\r\n" + name + b": ")[2].partition(b"\r\n")[0]


async def replicate(paths: list[str], rate: float) -> None:
    """Listen on each path, and step: a token for every stream."""
    loop = asyncio.get_running_loop()
    streams: dict[Replica, int] = {}
    for path in paths:
        await loop.create_unix_server(lambda: Replica(streams), path, backlog=1024)
    at = loop.time()
    while True:
        await asyncio.sleep(max(at + 1 / rate - loop.time(), 0))
        due = max(int((loop.time() - at) * rate), 1)
        at += due / rate
        for replica, left in list(streams.items()):
            if left > due:
                replica.transport.write(CHUNK * due)
                streams[replica] = left - due
            else:
                replica.transport.write(CHUNK * left + LAST)
                del streams[replica]


def run_replicas(paths: list[str], rate: float) -> None:
    uvloop.run(replicate(paths, rate))


class Client(asyncio.Protocol):
    """Asks again and again on one connection; counts events, and notes when the first came."""

    def __init__(self, host: str, tokens: int, again: Callable[[], bool]) -> None:
        self.request = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nX-Tokens: {tokens}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
        ).encode() + BODY
        self.again = again
        self.events = 0
        self.firsts: list[float] = []
        self.gaps: list[float] = []
        self.done = asyncio.get_running_loop().create_future()
        self.tail = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        self.asked = time.perf_counter()
        self.waiting = True
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        count = data.count(b'"delta"')
        self.events += count
        now = time.perf_counter()
        if self.waiting and count:
            self.waiting = False
            self.firsts.append(now - self.asked)
        elif count:
            self.gaps.append(now - self.read_at)
        self.read_at = now
        self.tail = (self.tail + data)[-5:]
        if self.tail == b"0\r\n\r\n":
            self.tail = b""
            if self.again():
                self.ask()
            else:
                self.transport.close()
                self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError("lost"))


async def first_tokens(connect: Callable[[Any], Any], count: int) -> list[float]:
    """Seconds to the first token, one request at a time."""
    client: Client | None = None
    made = [0]

    def again() -> bool:
        made[0] += 1
        return made[0] < count

    def make() -> Client:
        nonlocal client
        client = Client("bench", 1, again)
        return client

    await connect(make)
    assert client is not None
    await client.done
    return client.firsts[count // 10 :]


async def measure(port: int, path: str, pids: dict[str, int], args: Any) -> dict[str, float]:
    """``pids``: of the router and the replicas, by their names."""
    loop = asyncio.get_running_loop()

    def through(make: Any) -> Any:
        return loop.create_connection(make, "127.0.0.1", port)

    def direct(make: Any) -> Any:
        return loop.create_unix_connection(make, path)

    routed, alone, asking = [], [], 0.0
    for _ in range(ROUNDS):
        alone += await first_tokens(direct, REQUESTS)
        before = worked(pids["router"])
        routed += await first_tokens(through, REQUESTS)
        asking += worked(pids["router"]) - before
    told = await streamed(through, pids, args)
    return {
        "first_token_direct_ms": 1e3 * statistics.median(alone),
        "first_token_routed_ms": 1e3 * statistics.median(routed),
        "added_p50_ms": 1e3 * (statistics.median(routed) - statistics.median(alone)),
        "added_p99_ms": 1e3 * (percentile(routed, 99) - percentile(alone, 99)),
        "router_us_per_request": 1e6 * asking / (ROUNDS * REQUESTS),
        **told,
        "router_us_per_token": 1e6 * told["router_cores"] / told["tokens_per_second"],
        "tokens_per_second_of_a_core": told["tokens_per_second"] / told["router_cores"],
    }


async def streamed(
    connect: Callable[[Any], Any], pids: dict[str, int], args: Any
) -> dict[str, float]:
    """Tokens that come through per second, and what each process works for them."""
    loop = asyncio.get_running_loop()
    end = loop.time() + args.seconds + 2
    clients: list[Client] = []

    def make() -> Client:
        clients.append(Client("bench", args.tokens, lambda: loop.time() < end))
        return clients[-1]

    for _ in range(args.streams):
        await connect(make)
        await asyncio.sleep(0.5 / args.streams)
    await asyncio.sleep(1)
    began, before = loop.time(), {name: worked(pid) for name, pid in pids.items()}
    events = sum(client.events for client in clients)
    for client in clients:
        client.gaps.clear()
    await asyncio.sleep(args.seconds)
    tokens = sum(client.events for client in clients) - events
    gaps = [gap for client in clients for gap in client.gaps]
    seconds = loop.time() - began
    work = {f"{name}_cores": (worked(pids[name]) - before[name]) / seconds for name in pids}
    await asyncio.gather(*(client.done for client in clients))
    return {
        "tokens_per_second": tokens / seconds,
        "offered_per_second": args.streams * args.rate,
        "gap_p50_ms": 1e3 * statistics.median(gaps),
        "gap_p99_ms": 1e3 * percentile(gaps, 99),
        **work,
    }


def percentile(values: list[float], share: int) -> float:
    return statistics.quantiles(values, n=100)[share - 1]


def worked(pid: int) -> float:
    """Seconds of processor time of a process's first thread, which is all that a router has."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


@contextmanager
def replicas(paths: list[str], rate: float) -> Iterator[int]:
    """Their process's id."""
    process = multiprocessing.get_context("spawn").Process(target=run_replicas, args=(paths, rate))
    process.start()
    try:
        while not all(Path(path).exists() for path in paths):
            time.sleep(0.05)
        assert process.pid is not None
        yield process.pid
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=400)
    parser.add_argument("--rate", type=float, default=100.0, help="Tokens per second of a stream.")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--tokens", type=int, default=256, help="Of an answer.")
    parser.add_argument("--replicas", type=int, default=4)
    args = parser.parse_args()
    port = free_port()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        paths = [f"{folder}/{number}.sock" for number in range(args.replicas)]
        pids = {"replicas": stack.enter_context(replicas(paths, args.rate))}
        command = [sys.executable, "-m", "ruvon", "route", *(f"unix:{path}" for path in paths)]
        quiet = ["--port", str(port), "--log-level", "warning"]
        server = stack.enter_context(running([*command, *quiet], port))
        pids |= {"router": server.pid, "clients": os.getpid()}
        numbers = uvloop.run(measure(port, paths[0], pids, args))
    for name, value in numbers.items():
        print(f"{name:>28}  {value:12,.3f}")
    print(f"\nWrote {write('router', {'machine': machine(), 'numbers': numbers})}")


if __name__ == "__main__":
    main()
