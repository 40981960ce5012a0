"""Lesson 4: the loop behind HTTP. Each token is sent when it is there, as a server-sent event.

python docs/series/code/04_server.py
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from importlib import import_module
from time import perf_counter

import aiohttp
import llama
from aiohttp import web

kv_cache = import_module("03_kv_cache")

MODEL = web.AppKey("model", llama.Llama)
STEPS = web.AppKey("steps", list)


async def tokens(app: web.Application, prompt: list[int], most: int) -> AsyncIterator[int]:
    """The loop of lesson 3. A step runs in a thread: it lets go of the interpreter while it
    computes, so the event loop goes on answering others."""
    cache, pending = kv_cache.Cache(app[MODEL], len(prompt) + most), prompt
    for _ in range(most):
        logits = await asyncio.to_thread(kv_cache.step, app[MODEL], cache, pending)
        app[STEPS].append(1)
        pending = [int(logits.argmax())]
        if pending == [app[MODEL].end]:
            return
        yield pending[0]


async def complete(request: web.Request) -> web.StreamResponse:
    """What can be wrong is found before the status is sent; after it there is only the stream."""
    try:
        asked = json.loads(await request.text())
        prompt, most = request.app[MODEL].ask(asked["question"]), int(asked.get("max_tokens", 16))
    except (ValueError, KeyError, TypeError) as error:
        return web.json_response({"error": f"bad request: {error!r}"}, status=400)
    text = request.app[MODEL].tokenizer.stream()
    if not asked.get("stream"):
        pieces = [text.push([token]) async for token in tokens(request.app, prompt, most)]
        return web.json_response({"text": "".join(pieces)})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    async for token in tokens(request.app, prompt, most):
        event = json.dumps({"text": text.push([token])})
        await response.write(f"data: {event}\n\n".encode())  # raises when the client has left
    await response.write(b"data: [DONE]\n\n")
    return response


async def ask(url: str, stream: bool, **more: object) -> tuple[list[str], float, float]:
    """→ (what came, in order; seconds to the first of it; seconds to the end)."""
    start, first, came = perf_counter(), 0.0, []
    question = {"question": "Name the capital of France.", "stream": stream, **more}
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json=question) as response,
    ):
        async for line in response.content:
            first = first or perf_counter() - start
            if line.strip():
                came.append(line.decode().strip())
    return came, first, perf_counter() - start


async def leave_early(url: str) -> None:
    """Reads one event of a long answer and goes."""
    question = {"question": "Tell me a story.", "stream": True, "max_tokens": 200}
    async with aiohttp.ClientSession() as session, session.post(url, json=question) as response:
        await response.content.readline()


async def serve() -> None:
    app = web.Application()
    app[MODEL], app[STEPS] = llama.load(), []
    app.router.add_post("/complete", complete)
    runner = web.AppRunner(app, handler_cancellation=True)  # a handler ends when its client leaves
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/complete"
    try:
        for name, stream in (("before, all at the end", False), ("after, streamed", True)):
            came, first, total = await ask(url, stream)
            print(f"{name}: first word after ~{first:.2f} s of ~{total:.2f} s, {len(came)} lines")
        print("  " + "\n  ".join([*came[:2], "...", came[-1]]))
        print(f"\na bad request: {(await ask(url, False, max_tokens='x'))[0]}")
        app[STEPS].clear()
        await leave_early(url)
    finally:
        await runner.cleanup()  # waits for handlers: those that still have a client
    print(f"who leaves early stops the loop before 200 steps: {len(app[STEPS]) < 200}")


def main() -> None:
    asyncio.run(serve())


if __name__ == "__main__":
    main()
