"""Many clients at once, and clients that leave."""

from __future__ import annotations

import asyncio
import re
import time

import orjson

from ruvon.doctor.ask import CHAT, STORY, answer, chat, check_answered, post_chat, user
from ruvon.doctor.check import alone, collect, optional
from ruvon.doctor.expect import Skipped, expect, expect_equal
from ruvon.doctor.probe import Probe

ENDLESS = {"messages": user(STORY), "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
RUNNING = re.compile(
    rb"^(?:vllm:num_requests_running|ruvon_num_requests_running|sglang:num_running_reqs"
    rb"|llamacpp:requests_processing)(?:\{[^}]*\})? ([0-9.eE+]+)",
    re.MULTILINE,
)


async def parallel(probe: Probe) -> None:
    """Eight chats at once are all answered."""
    replies = await asyncio.gather(*(post_chat(probe, 10 + k, max_tokens=2) for k in range(8)))
    for reply in replies:
        answer(reply)


async def parallel_alike(probe: Probe) -> None:
    """At temperature 0 they all say the same: nobody gets another's answer."""
    questions = [f"Repeat the number {k}." for k in range(6)]
    alone = [await _text(probe, 0, question) for question in questions]
    together = await asyncio.gather(*(_text(probe, 1, question) for question in questions))
    expect_equal(together, alone, "texts of requests at once")


async def _text(probe: Probe, again: int, question: str) -> str:
    found = await chat(probe, again, messages=user(question), max_tokens=8)
    return str(found["choices"][0]["message"]["content"])


async def streams_side_by_side(probe: Probe) -> None:
    """Two streams at once both go on: the second does not wait for the end of the first."""
    body = {"model": probe.model, "stream": True, **ENDLESS, "max_tokens": 48}
    bodies = [orjson.dumps({**body, "seed": k}) for k in range(2)]
    first, second = await asyncio.gather(*(probe.fetch("POST", CHAT, b, {}) for b in bodies))
    check_answered(first, ENDLESS)
    expect(second.arrivals[0] < first.seconds, "its first piece before the other's end", "waiting")


async def health_meanwhile(probe: Probe) -> None:
    """The list of models is answered at once while answers are being generated."""
    body = orjson.dumps({"model": probe.model, "stream": True, **ENDLESS, "max_tokens": 32})
    busy = asyncio.create_task(probe.fetch("POST", CHAT, body, {}))
    try:
        begun = time.monotonic()
        answer(await probe.fetch("GET", "/v1/models", b"", {}))
        seconds = time.monotonic() - begun
        expect(seconds < 2, "an answer within 2 s", f"{seconds:.1f} s")
    finally:
        await asyncio.gather(busy, return_exceptions=True)


@alone
@optional
async def leaving_a_stream(probe: Probe) -> None:
    """Leaving a stream ends its request: /metrics shows none running soon after."""
    await _num_running(probe)
    body = orjson.dumps({"model": probe.model, "stream": True, **ENDLESS})
    async with probe.open("POST", CHAT, body) as response:
        expect_equal(response.status, 200, "status")
        await response.content.readany()
        response.close()
    await _ends(probe)


@alone
@optional
async def leaving_a_whole(probe: Probe) -> None:
    """So does leaving before an answer that is not streamed."""
    await _num_running(probe)
    body = orjson.dumps({"model": probe.model, **ENDLESS})
    asking = asyncio.create_task(probe.fetch("POST", CHAT, body, {}))
    await asyncio.sleep(0.5)
    expect(not asking.done(), "a request that goes on for half a second", "its end")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await _ends(probe)


@alone
async def answers_after_leaving(probe: Probe) -> None:
    """After ten clients have left in the middle the next is answered."""
    body = orjson.dumps({"model": probe.model, "stream": True, **ENDLESS, "max_tokens": 200})
    for _ in range(10):
        async with probe.open("POST", CHAT, body) as response:
            await response.content.readany()
            response.close()
    answer(await post_chat(probe, again=50, max_tokens=2))


async def _num_running(probe: Probe) -> float:
    """How many requests run, by /metrics."""
    reply = await probe.fetch("GET", "/metrics", b"", {})
    values = RUNNING.findall(reply.body) if reply.status == 200 else []
    if not values:
        raise Skipped("/metrics does not tell how many requests run")
    return sum(map(float, values))


async def _ends(probe: Probe, seconds: float = 3.0) -> None:
    """Wait until nothing runs."""
    begun = time.monotonic()
    while (running := await _num_running(probe)) > 0:
        expect(time.monotonic() - begun < seconds, f"none after {seconds:g} s", f"{running:g}")
        await asyncio.sleep(0.05)


CHECKS = collect("connection", globals())
