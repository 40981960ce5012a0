"""Clients that ask replicas again and again, and what shows how those are."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

PROMPT = {"prompt": [5, 6, 9], "max_tokens": 24, "ignore_eos": True}


class Load:
    """Clients that ask again and again, streams and not, and what came of it."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session, self.url = session, url
        self.outcomes: Counter[str] = Counter()
        self.over = False

    async def client(self, stream: bool) -> None:
        while not self.over:
            try:
                self.outcomes[await self.ask(stream)] += 1
            except aiohttp.ClientError as error:
                self.outcomes[f"lost: {error!r}"] += 1

    async def ask(self, stream: bool) -> str:
        body = PROMPT | {"stream": stream}
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            data = await response.read()
        if response.status != 200:
            return f"refused: {data!r}"
        if b"replica_lost" in data:
            return "cut"
        return "whole" if not stream or data.endswith(b"[DONE]\n\n") else f"broken: {data!r}"


@asynccontextmanager
async def load_on(url: str) -> AsyncIterator[Load]:
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        load = Load(session, url)
        for number in range(6):
            group.create_task(load.client(stream=number % 2 == 0))
        yield load
        load.over = True


async def until_ready(url: str, count: int) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{url}/ready") as response:
                if (await response.json())["ready"] == count:
                    return
            await asyncio.sleep(0.05)


def is_running(pid: int) -> bool:
    """Not of one that has ended and that nobody has asked about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a core for each replica")
