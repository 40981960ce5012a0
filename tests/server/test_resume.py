"""Streams that outlive their connection."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager

import openai
import pytest
from serving import ScriptRunner, Server

from ruvon.config import ServerConfig
from ruvon.server import resume
from ruvon.server.resume import KEPT

TEXT = "The quick brown fox jumps over the lazy dog."
CHAT = "/v1/chat/completions"
BODY = {
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
WANTED = {"X-Ruvon-Resume": "true"}


def events(data: bytes) -> list[bytes]:
    """Without comments."""
    return [event for event in data.split(b"\n\n") if event and not event.startswith(b":")]


def ids(data: bytes) -> list[str]:
    return re.findall(r"^id: (\S+)$", data.decode(), re.MULTILINE)


@asynccontextmanager
async def streaming(server: Server, path: str = CHAT, body: object = BODY, **headers: str):
    """A connection to a stream, which breaks at the end of the block."""
    async with server.session.post(server.url + path, json=body, headers=headers) as response:
        yield response
        response.close()


async def read_until(response, number: int) -> bytes:
    data = b""
    while len(ids(data)) < number:
        data += await response.content.readany()
    return data


async def going_on(server: Server, last: str, **headers: str):
    return await server.post(CHAT, BODY, headers={"Last-Event-ID": last, **WANTED, **headers})


def without_ids(data: list[bytes]) -> list[bytes]:
    """What events say, beside what no two answers have in common."""
    said = b"\n".join(re.sub(rb"^id: .*\n", b"", event) for event in data)
    return re.sub(rb"chatcmpl-\w+|\"created\":\d+", b"", said).split(b"\n")


async def test_a_dropped_stream_goes_on_where_it_was(serve):
    runner = ScriptRunner(TEXT, by_hand=True)
    server = await serve(runner=runner, enable_prefix_caching=False)
    uncut = asyncio.create_task(server.post(CHAT, BODY, headers=WANTED))
    await server.finish(uncut)
    async with streaming(server, **WANTED) as response:
        await server.until(lambda: server.fake.num_held)
        for _ in range(5):
            server.fake.finish_step()
            await server.until(lambda: server.fake.num_held)
        seen = await read_until(response, 4)
    assert server.num_live == 1  # goes on without a connection
    numbers = ids(seen)
    resumed = asyncio.create_task(going_on(server, numbers[3]))
    await server.finish(resumed)
    rest = resumed.result()
    assert rest.status == 200
    assert rest.headers["Content-Type"].startswith("text/event-stream")
    assert ids(rest.body)[0].endswith(":5")
    joined = events(seen)[:4] + events(rest.body)
    assert without_ids(joined) == without_ids(events(uncut.result().body))
    assert joined[-1].endswith(b"data: [DONE]")
    # The end may have got lost as well: it is kept for as long.
    again = await going_on(server, numbers[3])
    assert events(again.body) == events(rest.body)
    last = ids(rest.body)[-1]
    assert events((await going_on(server, last)).body) == []


async def test_nobody_who_did_not_ask_is_kept(serve):
    server = await serve(runner=ScriptRunner("a" * 400, seconds=0.002))
    async with streaming(server) as response:
        assert b"id:" not in await response.content.readany()
        assert server.num_live == 1
    await server.until(lambda: server.num_live == 0)
    assert len(server.app[KEPT]) == 0


async def test_who_does_not_come_back_is_given_up(serve):
    config = ServerConfig(port=0, resume_grace=0.05)
    server = await serve(server=config, runner=ScriptRunner(TEXT, by_hand=True))
    async with streaming(server, **WANTED) as response:
        await server.until(lambda: server.fake.num_held)
        server.fake.finish_step()
        last = ids(await read_until(response, 1))[-1]
    await server.until(lambda: len(server.app[KEPT]) == 0)
    await server.until(lambda: server.num_live == 0)
    server.fake.finish_step()
    reply = await going_on(server, last)
    assert (reply.status, reply.error["code"]) == (404, "stream_not_found")


async def test_grace_of_nothing_keeps_nothing(serve):
    server = await serve(TEXT, server=ServerConfig(port=0, resume_grace=0))
    reply = await server.post(CHAT, BODY, headers=WANTED)
    assert reply.events
    assert ids(reply.body) == []
    assert (await going_on(server, "chatcmpl-1:3")).status == 404


async def test_only_its_own_client_finds_a_stream(serve):
    server = await serve(TEXT, server=ServerConfig(port=0, api_key=("a", "b")))
    mine, other = {"Authorization": "Bearer a"}, {"Authorization": "Bearer b"}
    reply = await server.post(CHAT, BODY, headers=WANTED | mine)
    last = ids(reply.body)[2]
    assert (await going_on(server, last)).status == 401
    assert (await going_on(server, last, **other)).status == 404
    wrong = await server.post("/v1/completions", b"", headers={"Last-Event-ID": last, **mine})
    assert wrong.status == 404
    name = last.partition(":")[0]
    for number in ("999", "-1", "x", "", "9" * 5000, "²"):
        assert (await going_on(server, f"{name}:{number}", **mine)).status == 404
    assert (await going_on(server, last, **mine)).status == 200


async def test_a_name_that_is_taken_takes_nothing_away(serve):
    server = await serve(TEXT, server=ServerConfig(port=0, api_key=("a", "b")))
    keys = [{"Authorization": f"Bearer {key}"} for key in "aba"]
    body = BODY | {"request_id": "same"}
    first, other, second = [await server.post(CHAT, body, headers=WANTED | key) for key in keys]
    assert ids(first.body) == ids(other.body)
    assert ids(second.body) == []
    for key, reply in zip(keys, (first, other), strict=False):
        rest = await going_on(server, ids(first.body)[2], **key)
        assert events(rest.body) == events(reply.body)[3:]


async def test_a_second_reader_takes_over(serve):
    server = await serve(TEXT, runner=ScriptRunner(TEXT, by_hand=True))
    async with streaming(server, **WANTED) as first:
        await server.until(lambda: server.fake.num_held)
        server.fake.finish_step()
        last = ids(await read_until(first, 1))[0]
        second = asyncio.create_task(going_on(server, last))
        await first.content.read()  # it ends
        await server.finish(second)
    assert second.result().body.endswith(b"data: [DONE]\n\n")


async def test_an_error_is_kept_as_well(serve):
    runner = ScriptRunner(TEXT)
    runner.errors[0] = "broken"
    server = await serve(runner=runner)
    reply = await server.post(CHAT, BODY, headers=WANTED)
    *_, error, done = events(reply.body)
    assert b'"broken"' in error
    assert done.endswith(b"data: [DONE]")
    assert events((await going_on(server, ids(reply.body)[-2])).body) == [done]
    assert await server.post(CHAT, BODY | {"model": "none"}, headers=WANTED)


async def test_so_many_streams_and_bytes(serve, monkeypatch):
    monkeypatch.setattr(resume, "MOST_STREAMS", 2)
    monkeypatch.setattr(resume, "SENT_BYTES", 3000)
    server = await serve(TEXT)
    first, second, third = [await server.post(CHAT, BODY, headers=WANTED) for _ in range(3)]
    assert len(server.app[KEPT]) == 2  # the oldest that was over has made room
    assert (await going_on(server, ids(first.body)[-1])).status == 404
    for reply in (second, third):
        assert len(events(reply.body)) == len(events(first.body))
        assert (await going_on(server, ids(reply.body)[0])).status == 404
        assert (await going_on(server, ids(reply.body)[-3])).status == 200


async def test_generating_waits_for_whoever_does_not_read(serve, monkeypatch):
    monkeypatch.setattr(resume, "UNREAD_BYTES", 2000)
    server = await serve("a" * 400)
    async with streaming(server, **WANTED) as response:
        seen = await read_until(response, 2)
    reply = await going_on(server, ids(seen)[1])
    text = "".join(re.findall(r'"content":"(a+)"', seen.decode())[:1])
    numbers = [int(each.rpartition(":")[2]) for each in ids(reply.body)]
    assert numbers == list(range(3, numbers[-1] + 1))
    assert text + "".join(re.findall(r'"content":"(a+)"', reply.body.decode())) == "a" * 400


async def test_the_sdk_passes_over_the_numbers(serve):
    server = await serve(TEXT)
    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model="org/fake", **BODY, extra_headers=WANTED
        )
        text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
    assert text == TEXT


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
async def test_other_apis(serve, path):
    server = await serve(TEXT)
    body = {
        "/v1/completions": {"prompt": "Hi", "stream": True},
        "/v1/messages": BODY | {"model": "org/fake", "max_tokens": 50, "stream_options": None},
    }[path]
    reply = await server.post(path, body, headers=WANTED)
    numbers = ids(reply.body)
    assert len(numbers) == len(events(reply.body)) > 3
    rest = await server.post(path, body, headers={"Last-Event-ID": numbers[1]})
    assert events(rest.body) == events(reply.body)[2:]
