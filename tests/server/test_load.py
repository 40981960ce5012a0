"""Many at once: limits of keys, the queue's bounds, deadlines, what a waiting stream is told."""

from __future__ import annotations

import asyncio
import re

import openai
import orjson
import pytest
from serving import ScriptRunner
from structlog.testing import capture_logs

from ruvon.config import ServerConfig
from ruvon.errors import RateLimitError
from ruvon.server.rate_limits import RateLimits, span

BODY = {"messages": [{"role": "user", "content": "Hi"}]}


class Clock:
    """Time that moves when told to."""

    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


def keyed(key):
    return {"headers": {"Authorization": f"Bearer {key}"}}


async def metrics_of(server):
    return (await server.get("/metrics")).body.decode()


# ------------------------------------------------------------------------------ rate limits


def test_a_bucket_fills_up_in_a_minute():
    clock = Clock()
    limits = RateLimits(3, None, clock)
    for _ in range(3):
        limits.enter("a")
    with pytest.raises(
        RateLimitError, match=r"3 requests per minute. Please try again in 20s"
    ) as e:
        limits.enter("a")
    assert (e.value.retry_after, e.value.setting) == (20, "rate_limit_requests")
    limits.enter("b")
    clock.now += 20
    limits.enter("a")
    clock.now += 1000
    assert limits.headers("a") == {
        "X-RateLimit-Limit-Requests": "3",
        "X-RateLimit-Remaining-Requests": "3",
        "X-RateLimit-Reset-Requests": "0ms",
    }


def test_tokens_that_were_not_there_are_owed():
    clock = Clock()
    limits = RateLimits(None, 60, clock)
    limits.enter("a")
    limits.spend("a", 90)
    assert limits.headers("a")["X-RateLimit-Remaining-Tokens"] == "0"
    assert limits.headers("a")["X-RateLimit-Reset-Tokens"] == "1m30s"
    with pytest.raises(RateLimitError, match="try again in 31s") as caught:
        limits.enter("a")
    assert caught.value.setting == "rate_limit_tokens"
    clock.now += 31
    limits.enter("a")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.02, "20ms"), (1, "1s"), (1.25, "1.25s"), (59.9999, "1m0s"), (360, "6m0s")],
)
def test_times_as_openai_writes_them(seconds, text):
    assert span(seconds) == text


async def test_each_key_has_its_own_limit_and_is_told_of_it(serve):
    config = ServerConfig(
        port=0, api_key=("one", "two"), rate_limit_requests=2, rate_limit_tokens=1000
    )
    server = await serve("Hello", server=config)
    first = await server.post("/v1/chat/completions", BODY, **keyed("one"))
    assert first.status == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "1000"
    used = first.json["usage"]["total_tokens"]
    second = await server.post("/v1/chat/completions", BODY | {"stream": True}, **keyed("one"))
    assert second.status == 200
    left = int(second.headers["x-ratelimit-remaining-tokens"])
    assert 1000 - 2 * used <= left < 1000 - used + 10  # the answer is not counted yet
    third = await server.post("/v1/chat/completions", BODY, **keyed("one"))
    assert third.status == 429
    assert third.error["type"] == "rate_limit_error"
    assert third.error["code"] == "rate_limit_exceeded"
    assert "try again in" in third.error["message"]
    assert 1 <= int(third.headers["Retry-After"]) <= 30
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert (await server.post("/v1/chat/completions", BODY, **keyed("two"))).status == 200
    assert (await server.post("/tokenize", {"prompt": "a"}, **keyed("one"))).status == 200
    assert (
        'reason="rate_limit_requests"} 1.0'
        in (await server.get("/metrics", **keyed("one"))).body.decode()
    )


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/completions"])
async def test_tokens_are_counted_whatever_is_asked_for(serve, path):
    server = await serve("Hello", server=ServerConfig(port=0, rate_limit_tokens=5))
    body = {"input": "12345678"} if "embeddings" in path else {"prompt": "12345678"}
    assert (await server.post(path, body)).status == 200
    refused = await server.post(path, body)
    assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")


async def test_no_limits_no_headers(serve):
    server = await serve("Hello")
    assert not any("ratelimit" in name.lower() for name in (await server.chat()).headers)


async def test_an_sdk_knows_a_limit_when_it_meets_one(serve):
    server = await serve("Hello", server=ServerConfig(port=0, rate_limit_requests=1))
    assert (await server.chat()).status == 200
    async with openai.AsyncOpenAI(
        base_url=server.url + "/v1", api_key="x", max_retries=0
    ) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="org/fake", messages=BODY["messages"])
        assert caught.value.code == "rate_limit_exceeded"


# ------------------------------------------------------------------------------ the queue


async def test_a_queue_full_of_tokens_says_when_to_come_back(serve):
    server = await serve(
        runner=ScriptRunner("x", by_hand=True), max_num_seqs=1, max_num_queued_tokens=30
    )
    running = asyncio.create_task(server.chat())
    await server.until(lambda: server.fake.num_held)
    waiting = asyncio.create_task(server.chat())
    await server.until(lambda: server.num_live == 2)
    refused = await server.chat()
    assert (refused.status, refused.error["code"]) == (503, "queue_full")
    assert int(refused.headers["Retry-After"]) >= 1
    assert 'reason="max_num_queued_tokens"} 1.0' in await metrics_of(server)
    await server.finish(running, waiting)


async def test_a_waiting_stream_is_told_its_place_and_how_far_its_prompt_is(serve):
    server = await serve(
        runner=ScriptRunner("ok", by_hand=True),
        server=ServerConfig(port=0, sse_keep_alive_interval=0.1),
        max_num_seqs=1,
        max_num_batched_tokens=8,
    )
    running = asyncio.create_task(server.chat(max_tokens=1))
    await server.until(lambda: server.fake.num_held)
    first = asyncio.create_task(server.chat(max_tokens=1))
    await server.until(lambda: server.num_live == 2)
    body = {"messages": [{"role": "user", "content": "long " * 80}], "stream": True}
    async with server.session.post(
        server.url + "/v1/chat/completions", data=orjson.dumps(body)
    ) as response:
        read = response.content.readuntil
        assert b'"role":"assistant"' in await read(b"\n\n")
        assert await read(b"\n\n") == b": queued 1\n\n"
        await server.finish(running, first)
        await server.until(lambda: server.fake.num_held)
        while (comment := await read(b"\n\n")) in (b": queued 1\n\n", b": queued 0\n\n"):
            pass
        assert re.fullmatch(rb": prefill [1-9]\d*/419\n\n", comment)
        rest = asyncio.create_task(response.read())
        await server.finish(rest)
        assert rest.result().endswith(b"data: [DONE]\n\n")


# ------------------------------------------------------------------------------ deadlines


ASKED = [
    ({"timeout": 0.5}, {}),
    ({}, {"headers": {"X-Request-Timeout": "0.5"}}),
    ({"timeout": 60}, {"headers": {"X-Request-Timeout": "0.5"}}),
]


@pytest.mark.parametrize(("fields", "options"), ASKED)
async def test_a_request_that_is_not_done_in_time_fails_and_frees_what_it_held(
    serve, fields, options
):
    server = await serve(runner=ScriptRunner("x", by_hand=True))
    reply = await server.post("/v1/chat/completions", BODY | fields, **options)
    assert (reply.status, reply.error["code"]) == (504, "deadline_exceeded")
    assert "prefill" in reply.error["message"]
    assert reply.headers["X-Should-Retry"] == "false"
    server.fake.finish_step()
    await server.until(lambda: server.idle)
    assert 'finished_reason="deadline",model_name="org/fake"} 1.0' in await metrics_of(server)


async def test_time_in_the_queue_counts(serve):
    server = await serve(
        runner=ScriptRunner("x", by_hand=True),
        server=ServerConfig(port=0, request_timeout=0.05),
        max_num_seqs=1,
    )
    replies = await asyncio.gather(server.chat(), server.chat())
    assert [reply.status for reply in replies] == [504, 504]
    assert any("(queued 0)" in reply.error["message"] for reply in replies)
    server.fake.finish_step()


async def test_a_stream_that_has_begun_ends_with_an_error_event(serve):
    server = await serve(runner=ScriptRunner("x" * 100, by_hand=True))
    with capture_logs() as logs:
        reading = asyncio.create_task(server.chat(stream=True, timeout=0.3))
        await server.until(lambda: server.fake.num_held)
        server.fake.finish_step()
        reply = await reading
    assert reply.status == 200
    assert reply.events[-1]["error"]["code"] == "deadline_exceeded"
    assert "(1 tokens generated)" in reply.events[-1]["error"]["message"]
    (line,) = (entry for entry in logs if entry["event"] == "request")
    assert line["status"] == 504
    server.fake.finish_step()
    await server.until(lambda: server.idle)


async def test_what_is_done_in_time_is_as_ever(serve):
    server = await serve("Hello", server=ServerConfig(port=0, request_timeout=60))
    assert (await server.chat(timeout=30)).json["choices"][0]["finish_reason"] == "stop"
    server.assert_idle()


@pytest.mark.parametrize("value", [0, -1, "5", 1e9])
async def test_a_timeout_that_is_none_is_refused(serve, value):
    server = await serve("Hello")
    reply = await server.chat(timeout=value)
    assert (reply.status, reply.error["param"]) == (400, "timeout")


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
async def test_so_is_a_header(serve, text):
    server = await serve("Hello")
    reply = await server.post("/v1/chat/completions", BODY, headers={"X-Request-Timeout": text})
    assert (reply.status, reply.error["param"]) == (400, "X-Request-Timeout")


async def test_anthropic_s_clients_are_told_in_their_words(serve):
    server = await serve(runner=ScriptRunner("x", by_hand=True))
    body = BODY | {"max_tokens": 5, "timeout": 0.05}
    reply = await server.post("/v1/messages", body)
    assert (reply.status, reply.json["error"]["type"]) == (504, "timeout_error")
    server.fake.finish_step()
