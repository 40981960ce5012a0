"""Clients that hold connections: too many, too slow to ask, too slow to read."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from serving import ScriptRunner, Server

from ruvon.config import ServerConfig
from ruvon.server import connection
from ruvon.server.connection import Open, address_of, takes_nothing

LIVE = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"


async def connect(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def answer(reader: asyncio.StreamReader) -> bytes:
    """One answer, with its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = [line for line in head.lower().split(b"\r\n") if b"content-length" in line]
    return head + await reader.readexactly(int(length.partition(b":")[2]))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(connection, "SWEEP", 0.01)
    monkeypatch.setattr(connection, "HEAD_PATIENCE", 0.05)
    monkeypatch.setattr(connection, "READ_PATIENCE", 0.05)


async def test_a_body_is_no_part_of_headers_whenever_it_comes(serve, impatient):
    """A piece of it comes just when its request has been taken up and its handler has not begun;
    the answer takes longer than headers may."""
    server = await serve(runner=ScriptRunner("Hello", by_hand=True))
    reader, writer = await connect(server)
    await server.until(lambda: connections(server).connections)
    (handler,) = connections(server).connections
    body = b'{"prompt": "Hi"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    handler.data_received(head + body[:5])
    while handler._messages:  # noqa: ASYNC110 - aiohttp's, which tells nobody
        await asyncio.sleep(0)
    handler.data_received(body[5:])
    await server.until(lambda: server.fake.num_held)
    connections(server).sweep(asyncio.get_running_loop().time() + 60)
    told = asyncio.create_task(answer(reader))
    await server.finish(told)
    assert b"200 OK" in told.result()
    assert handler.head_since is None
    writer.close()


@pytest.mark.parametrize("before", [b"", LIVE])
async def test_headers_that_never_end(serve, impatient, before):
    """Slowloris: a byte now and then, so that the connection is never idle."""
    server = await serve()
    reader, writer = await connect(server)
    if before:
        writer.write(before)
        assert b"200 OK" in await answer(reader)
    told = asyncio.create_task(reader.read())
    writer.write(b"POST /v1/completions HTTP/1.1\r\n")
    for name in range(10_000):
        if told.done():
            break
        writer.write(b"X-%d: y\r\n" % name)
        await asyncio.sleep(0.005)
    assert b"408 Request Timeout" in await told
    assert b'"code":"request_timeout"' in told.result()
    writer.close()


async def test_who_asks_before_a_body_and_is_gone_is_no_fault_of_ours(serve, capsys):
    """It leaves just before it is told to go on."""
    server = await serve()
    _, writer = await connect(server)
    await server.until(lambda: connections(server).connections)
    (handler,) = connections(server).connections
    asked = b"Host: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    handler.data_received(b"POST /v1/completions HTTP/1.1\r\n" + asked)
    while handler._messages:  # noqa: ASYNC110 - aiohttp's, which tells nobody
        await asyncio.sleep(0)
    handler.transport.abort()
    await server.until(lambda: not len(connections(server)))
    assert "connection_failed" not in "".join(capsys.readouterr())
    writer.close()


async def test_an_idle_connection_is_closed(serve):
    server = await serve(server=ServerConfig(port=0, keep_alive_timeout=1))
    reader, writer = await connect(server)
    assert await reader.read() == b""
    writer.close()


async def test_a_client_that_reads_nothing_is_let_go(serve, impatient):
    server = await serve()
    _, writer = await connect(server)
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    open_now = connections(server)
    await server.until(lambda: len(open_now) == 1)
    for _ in range(200):  # 40 MB of answers, more than kernels keep
        writer.write(asked)
    await server.until(lambda: len(open_now) == 0)
    assert (await server.get("/live")).status == 200
    writer.close()


def connections(server: Server) -> connection.Server:
    found = server.runner.server
    assert isinstance(found, connection.Server)
    return found


def test_who_reads_slowly_is_not_who_reads_nothing():
    waiting: list[int] = []
    transport: Any = SimpleNamespace(
        get_write_buffer_size=lambda: waiting[-1], is_closing=lambda: False
    )
    opened = Open(transport, "")

    def look(unsent: int, now: float, is_paused: bool = True) -> bool:
        waiting.append(unsent)
        return takes_nothing(opened, is_paused, now)

    patience = connection.READ_PATIENCE
    for step in range(100):
        assert not look(100_000 - step, step * patience / 2)
    now = 100 * patience / 2
    assert not look(100_000, now, is_paused=False)  # more was added: nobody waits for this client
    assert not look(100_000, now + 2 * patience, is_paused=False)
    assert not look(100_000, now + 2 * patience)
    assert not look(100_000, now + 3 * patience)
    assert look(100_000, now + 3 * patience + 1)
    assert not look(0, now + 9 * patience)


async def test_there_are_so_many_connections_and_no_more(serve):
    server = await serve(server=ServerConfig(port=0, max_connections=2))
    first, second = await connect(server), await connect(server)
    await server.until(lambda: len(connections(server)) == 2)
    reader, writer = await connect(server)
    told = await reader.read()
    assert b"503 Service Unavailable" in told
    assert b"Retry-After: 1" in told
    assert b'"code":"too_many_connections"' in told
    assert b"all 2 connections" in told
    first[1].close()
    await server.until(lambda: len(connections(server)) == 1)
    metrics = await server.get("/metrics")
    assert b"ruvon_connections_refused_total 1.0" in metrics.body
    assert b"\nruvon_connections 2.0" in metrics.body
    second[1].close()
    writer.close()


async def test_one_address_leaves_room_for_others(serve, monkeypatch):
    addresses = iter(["198.51.100.7"] * 4 + ["203.0.113.9"] * 2)
    monkeypatch.setattr(connection, "address_of", lambda transport: next(addresses))
    server = await serve(server=ServerConfig(port=0, max_connections_per_address=1))
    greedy = await connect(server)  # is asked for twice: once for room, once to be counted
    await server.until(lambda: len(connections(server)) == 1)
    for _ in range(2):
        reader, writer = await connect(server)
        assert b"Your address has all 1 connections" in await reader.read()
        writer.close()
    other = await connect(server)
    other[1].write(LIVE)
    assert b"200 OK" in await answer(other[0])
    greedy[1].close()
    other[1].close()


@pytest.mark.parametrize(
    ("peer", "counted"),
    [
        (("127.0.0.1", 1), ""),
        (("::1", 1, 0, 0), ""),
        (("::ffff:127.0.0.1", 1, 0, 0), ""),
        (("198.51.100.7", 1), "198.51.100.7"),
        (("::ffff:198.51.100.7", 1, 0, 0), "198.51.100.7"),
        (("2001:db8:1:2:3:4:5:6", 1, 0, 0), "2001:db8:1:2::"),
        (("fe80::1%eth0", 1, 0, 2), "fe80::"),
        ("/run/socket", ""),
        (None, ""),
    ],
)
def test_whom_a_connection_counts_for(peer, counted):
    transport: Any = SimpleNamespace(get_extra_info=lambda name: peer)
    assert address_of(transport) == counted
