"""The loop is never held: the largest bodies that each handler takes, beside a stream.

What is measured is not time on a clock, which on a busy machine is others' as well, but the
processor time that this process spends between two turns of a timer that is due every millisecond.
It grows while the event loop's thread works through one callback, and while another thread keeps
the interpreter's lock in one native call; it stands still while others have the processor. Threads
that work without the lock can add to it while the system keeps the loop's thread waiting: so the
best of a few tries counts, for what holds the loop does so in each of them.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import uvloop
from serving import Server, open_server

BUDGET = 0.020  # seconds
TRIES = 3
CONTEXT = 8192
MODEL = "org/fake"
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"

WORDS = b"hello wo" * (1 << 20)
EMPTY = b'{"role":"user","content":""},'
PART = b'{"type":"text","text":"a"},'
CALL = b'{"type":"function","function":{"name":"f","arguments":"{}"}},'


def user(content: bytes) -> bytes:
    return b'{"messages":[{"role":"user","content":%s}],"max_tokens":1}' % content


def messages(one: bytes, count: int) -> bytes:
    return b'{"messages":[%s{"role":"user","content":""}]}' % (one * (count - 1))


def prompt(value: bytes, more: bytes = b"") -> bytes:
    return b'{"prompt":%s,"max_tokens":1%s}' % (value, more)


def ids(count: int) -> bytes:
    return b"[%s97]" % (b"97," * (count - 1))


def biases(count: int) -> bytes:
    return b"{%s}" % b",".join(b'"%d":1' % number for number in range(count))


BODIES = {
    # what is taken
    "a chat that fills the context": (CHAT, user(b'"%s"' % WORDS[:8000]), 200),
    "a prompt that fills the context": (COMPLETE, prompt(b'"%s"' % WORDS[:8000]), 200),
    "ids that fill the context": (COMPLETE, prompt(ids(CONTEXT - 1)), 200),
    "a text of as many characters as may fit": ("/tokenize", b'{"prompt":"%s","return_token_strs":true}' % WORDS[: CONTEXT * 12], 200),
    "as many messages as are taken": ("/tokenize", messages(EMPTY, 4096), 200),
    "as many ids as are taken": ("/detokenize", b'{"tokens":%s}' % ids(80_000), 200),
    "all biases": (COMPLETE, prompt(b'"a"', b',"logit_bias":' + biases(260)), 200),
    "bad words": (COMPLETE, prompt(b'"a"', b',"bad_words":[%s"b"]' % (b'"%s",' % WORDS[:128] * 255)), 200),
    # what is refused after a look at it
    "one text": (CHAT, user(b'"%s"' % WORDS[: (8 << 20) - 100]), 400),
    "one text of escapes": (CHAT, user(b'"%s%s"' % (b"\\n" * (1 << 20), WORDS[: 5 << 20])), 400),
    "a text of letters beyond ASCII": (COMPLETE, prompt('"{}"'.format("é" * (4 << 20))[:-99].encode() + b'"'), 400),
    "messages that do not fit": (CHAT, messages(EMPTY, 4096), 400),
    "too many messages": (CHAT, messages(EMPTY, 30_000), 400),
    "far too many messages": (CHAT, messages(EMPTY, 150_000), 400),
    "lists of parts": (CHAT, messages(b'{"role":"user","content":[%s{"type":"text","text":""}]},' % (PART * 1023), 30), 400),
    "tool calls": (CHAT, messages(b'{"role":"assistant","tool_calls":[%s]},' % (CALL * 1024)[:-1], 15), 200),
    "template variables": (CHAT, b'{"messages":[%s],"chat_template_kwargs":{"a":%s}}' % (EMPTY[:-1], ids(80_000)), 200),
    "tools": (CHAT, b'{"messages":[%s],"tools":%s}' % (EMPTY[:-1], ids(80_000)), 400),
    "unknown fields": (CHAT, b'{"messages":[%s],%s' % (EMPTY[:-1], biases(80_000)[1:]), 200),
    "another model's": (CHAT, b'{"model":"x",' + messages(EMPTY, 30_000)[1:], 404),
    "ids that do not fit": (COMPLETE, prompt(ids(80_000)), 400),
    "far too many ids": (COMPLETE, prompt(ids(2_000_000)), 400),
    "prompts": (COMPLETE, prompt(b'[%s"a"]' % (b'"hello",' * 2047)), 400),
    "prompts of ids": (COMPLETE, prompt(b"[%s[1]]" % (b"[1,2,3]," * 2047)), 400),
    "too many biases": (COMPLETE, prompt(b'"a"', b',"logit_bias":' + biases(80_000)), 400),
    "far too many biases": (COMPLETE, prompt(b'"a"', b',"logit_bias":' + biases(400_000)), 400),
    "allowed ids": (COMPLETE, prompt(b'"a"', b',"allowed_token_ids":' + ids(80_000)), 400),
    "ids that stop": (COMPLETE, prompt(b'"a"', b',"stop_token_ids":' + ids(80_000)), 400),
    "stops": (COMPLETE, prompt(b'"a"', b',"stop":[%s"b"]' % (b'"b",' * 80_000)), 400),
    "lists in lists": (COMPLETE, prompt(b"[" * 500_000), 400),
    "quotes": (COMPLETE, b'"' * (8 << 20), 400),
    "backslashes": (COMPLETE, b'{"prompt":"%s"}' % (b"\\" * (8 << 20))[:-99], 400),
    "zeros": (COMPLETE, bytes((8 << 20) - 1), 400),
}  # fmt: skip


@pytest.fixture
def frozen() -> Iterator[None]:
    """As while serving, the garbage collector does not look through what was there before."""
    threshold = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
    yield
    gc.set_threshold(*threshold)
    gc.unfreeze()


@asynccontextmanager
async def streaming(server: Server) -> AsyncIterator[None]:
    """A stream that goes on all the while."""

    async def stream() -> None:
        while True:
            await server.complete("Hi", stream=True, max_tokens=1000)

    task = asyncio.create_task(stream())
    await server.until(lambda: server.fake.plans)
    yield
    assert not task.done()
    task.cancel()
    await asyncio.wait([task])


class Lag:
    """The most processor time between two turns."""

    def __init__(self) -> None:
        self.worst = 0.0
        self._before = time.process_time()
        self._turn()

    def _turn(self) -> None:
        now = time.process_time()
        self.worst = max(self.worst, now - self._before)
        self._before = now
        self._timer = asyncio.get_running_loop().call_later(0.001, self._turn)

    def stop(self) -> float:
        self._timer.cancel()
        return self.worst


def post(server: Server, path: str, body: bytes) -> int:
    """Send a body from this thread; returns the status."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.request("POST", path, body)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


@pytest.mark.parametrize("name", BODIES)
def test_no_body_holds_the_loop(frozen, name):
    path, body, status = BODIES[name]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the loop that serves
        lags = runner.run(measure(path, body, status))
    print("LAG", name, [round(1000 * x, 1) for x in lags])
    assert min(lags) < BUDGET, [round(1000 * lag, 1) for lag in lags]


async def measure(path: str, body: bytes, status: int) -> list[float]:
    """The lag that a body causes, until it is within the budget."""
    numbers = {"max_model_len": CONTEXT, "num_blocks": 2048}
    server = await open_server(
        lambda prompt: "ab" * 5000 if prompt == "Hi" else "c", numbers=numbers
    )
    lags: list[float] = []
    async with server.stack, streaming(server):
        while len(lags) < TRIES and not any(lag < BUDGET for lag in lags):
            lag = Lag()
            assert await asyncio.to_thread(post, server, path, body) == status
            lags.append(lag.stop())
    return lags
