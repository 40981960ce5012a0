"""Lesson 6: one model, many who ask: a queue with a bound, and one loop that takes from it.

python docs/series/code/06_queue.py
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib import import_module

import llama

kv_cache = import_module("03_kv_cache")


class Full(Exception):
    """The queue has no room: a server would answer 503."""


@dataclass
class Request:
    name: str
    prompt: list[int]
    most: int
    tokens: asyncio.Queue[int | None] = field(default_factory=asyncio.Queue)  # None: the end
    waited: int = 0  # steps that were others'


class Engine:
    """One task owns the model. Handlers only append to a queue, and read their own."""

    def __init__(self, model: llama.Llama, most_waiting: int) -> None:
        self.model = model
        self.waiting: asyncio.Queue[Request] = asyncio.Queue(most_waiting)
        self.steps = 0

    async def generate(self, request: Request) -> AsyncIterator[int]:
        """The tokens of a request. Raises Full at once, before anything is promised."""
        request.waited = self.steps
        try:
            self.waiting.put_nowait(request)
        except asyncio.QueueFull:
            raise Full from None
        while (token := await request.tokens.get()) is not None:
            yield token

    async def run(self) -> None:
        """Forever: the first in the queue, to its end, then the next."""
        while True:
            request = await self.waiting.get()
            request.waited = self.steps - request.waited
            cache = kv_cache.Cache(self.model, len(request.prompt) + request.most)
            pending = request.prompt
            for _ in range(request.most):
                logits = await asyncio.to_thread(kv_cache.step, self.model, cache, pending)
                self.steps += 1
                pending = [int(logits.argmax())]
                request.tokens.put_nowait(pending[0])
            request.tokens.put_nowait(None)


async def client(engine: Engine, request: Request) -> str:
    try:
        tokens = [token async for token in engine.generate(request)]
    except Full:
        return f"  {request.name}: refused at once, may try again later"
    text = engine.model.decode(tokens)
    return f"  {request.name}: waited for {request.waited:>2} steps of others, then {text!r}"


async def burst(model: llama.Llama, most_waiting: int, num: int) -> int:
    """All ask at the same moment → steps that the last served one waited for."""
    engine = Engine(model, most_waiting)
    loop = asyncio.create_task(engine.run())
    prompt = model.encode("One, two, three,")
    requests = [Request(f"request {i}", prompt, 4) for i in range(num)]
    for line in await asyncio.gather(*(client(engine, request) for request in requests)):
        print(line)
    loop.cancel()
    return max(request.waited for request in requests)


def main() -> None:
    model = llama.load()
    print("before, a queue without a bound:")
    longest = asyncio.run(burst(model, 0, 5))
    print(f"  the longest wait: {longest} steps, and it grows with every arrival")
    print("after, at most 2 wait:")
    longest = asyncio.run(burst(model, 2, 5))
    print(f"  the longest wait: {longest} steps, whatever arrives")


if __name__ == "__main__":
    main()
