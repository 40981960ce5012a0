"""Replicas that are not as ours: frozen, of another make, or no servers at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from routers import close, open_router
from serving import open_server

from ruvon.config import ServerConfig
from ruvon.router import replica as replicas

READY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
UNSIZED = b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nonetwo"
LARGE = b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 3_000_000
NONSENSE = b"SSH-2.0-OpenSSH\r\n\r\n"


@asynccontextmanager
async def raw(answer: Callable[[bytes], Awaitable[bytes | None]]):
    """A server of bytes: what it answers to a request's first line; None never answers."""

    over, serving = asyncio.Event(), set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        try:
            while line := await reader.readline():
                while (await reader.readline()).strip():
                    pass
                if (data := await answer(line)) is None:
                    await over.wait()
                    return
                writer.write(data)
                if data == UNSIZED:
                    break
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        over.set()
        await asyncio.gather(*serving, return_exceptions=True)


@asynccontextmanager
async def routing(*urls: str):
    """A router over servers that are no fakes of ours."""
    router = await open_router([], ServerConfig(port=0))
    for url in urls:
        router.fleet.add(url)
    try:
        yield router
    finally:
        await router.stack.aclose()


def other(answer: bytes) -> Callable[[bytes], Awaitable[bytes]]:
    """A server that knows no ``/load`` and no ``/ready``."""

    async def answered(line: bytes) -> bytes:
        if b"/health" in line:
            return READY
        return MISSING if b"/load" in line or b"/ready" in line else answer

    return answered


@pytest.mark.parametrize("answer", [CHUNKED, UNSIZED], ids=["chunked", "unsized"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_every_framing_reaches_every_client(answer, version):
    async with raw(other(answer)) as url, routing(url) as router:
        await router.until(lambda: router.fleet.num_open)
        host, port = router.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET /x HTTP/{version}\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        data = await reader.read()
        writer.close()
        head, _, body = data.partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/{version} 200".encode())
        if version == "1.0":
            assert body == b"onetwo"
        else:
            assert b"one" in body
            assert body.endswith(b"\r\n0\r\n\r\n")


async def test_a_large_answer_passes_in_pieces():
    async with raw(other(LARGE)) as url, routing(url) as router:
        await router.until(lambda: router.fleet.num_open)
        reply = await router.get("/large")
        assert reply.headers["Content-Length"] == "3000000"
        assert reply.body == b"x" * 3_000_000


async def test_what_is_no_server_is_never_asked():
    async def nonsense(line: bytes) -> bytes:
        return NONSENSE

    async with raw(nonsense) as url, routing(url) as router:
        await router.until(lambda: router.fleet.replicas[0].num_missed > 1)
        assert (await router.get("/v1/models")).status == 503


async def test_who_freezes_leaves_what_it_has_not_begun_to_others(monkeypatch):
    monkeypatch.setattr(replicas, "POLL_TIMEOUT", 0.1)
    frozen = False

    async def freezing(line: bytes) -> bytes | None:
        nonlocal frozen
        frozen |= line.startswith(b"POST")
        return (
            None if frozen else READY.replace(b"{}", b'{"status":"ready"}').replace(b": 2", b": 18")
        )

    server = await open_server("said")
    async with raw(freezing) as url, routing(url) as router:
        await router.until(lambda: router.fleet.num_open)
        asked = asyncio.create_task(router.chat("Hi"))
        await router.until(lambda: frozen)
        router.fleet.add(server.url)
        reply = await asked
        assert reply.json["choices"][0]["message"]["content"] == "said"
        assert router.fleet.replicas[0].status == "down"
    await close(server)
