"""Runs checks, several at once, each for a limited time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

import aiohttp

from ruvon.doctor.ask import not_offered
from ruvon.doctor.check import Check, Outcome, Result
from ruvon.doctor.expect import Failed, Skipped, brief
from ruvon.doctor.groups import ALL
from ruvon.doctor.probe import Probe, Reply
from ruvon.errors import RuvonError

Progress: TypeAlias = Callable[[Result], None]

PATIENCE = 120.0  # seconds for a server that is still loading
POLL = 0.2
UNAVAILABLE = 503
MOST_TIMEOUTS = 24
"""Checks that may run out of time. Then the server is taken to be stuck, and no more is asked."""


def choose(globs: Sequence[str]) -> list[Check]:
    """The checks whose ids match any of these; all without one. ``chat`` means ``chat.*`` too."""
    if not globs:
        return list(ALL)
    wanted = [*globs, *(f"{glob}.*" for glob in globs)]
    return [check for check in ALL if any(fnmatchcase(check.id, glob) for glob in wanted)]


async def examine(
    url: str,
    checks: Sequence[Check],
    *,
    model: str | None = None,
    api_key: str | None = None,
    concurrency: int = 8,
    timeout: float = 60.0,
    patience: float = PATIENCE,
    progress: Progress = lambda result: None,
) -> tuple[str, list[Result]]:
    """The model that was asked and a result for each check, in their order.

    ``url`` may end in ``/v1``; without ``model`` it is the first that the server lists. A server
    that loads its model gets ``patience`` seconds for that. Raises RuvonError where nobody answers,
    and for a server that is not ready then.
    """
    connector = aiohttp.TCPConnector(limit=0)
    limits = aiohttp.ClientTimeout(total=timeout)
    async with aiohttp.ClientSession(connector=connector, timeout=limits) as session:
        probe = Probe(session, url.rstrip("/").removesuffix("/v1"), api_key=api_key)
        await until_ready(probe, patience)
        probe.model = model or await first_model(probe)
        try:
            return probe.model, await _run_all(probe, checks, concurrency, timeout, progress)
        finally:
            await probe.close()


async def until_ready(probe: Probe, patience: float) -> None:
    """Wait for a server that says it is loading, by one of the paths that servers say it at."""
    deadline = time.monotonic() + patience
    while (reply := await readiness(probe)).status == UNAVAILABLE:
        if time.monotonic() > deadline:
            told = brief(reply.body.decode(errors="replace"), 200)
            raise RuvonError(f"{probe.url} is not ready after {patience:g} s; it says {told}")
        await asyncio.sleep(POLL)


async def readiness(probe: Probe) -> Reply:
    """What ``/ready`` says, or ``/health`` where there is no such path."""
    try:
        reply = await probe.fetch("GET", "/ready", b"", {})
        return await probe.fetch("GET", "/health", b"", {}) if not_offered(reply) else reply
    except (aiohttp.ClientError, OSError) as error:
        raise RuvonError(f"{probe.url} cannot be reached: {error}") from error


async def first_model(probe: Probe) -> str:
    """The first name that the server lists."""
    reply = await probe.get("/v1/models")
    try:
        return str(reply.json["data"][0]["id"])
    except (Failed, KeyError, IndexError, TypeError):
        return "default"


async def _run_all(
    probe: Probe, checks: Sequence[Check], concurrency: int, timeout: float, progress: Progress
) -> list[Result]:
    """Those that must be alone come last, one after the other."""
    turn = asyncio.Semaphore(concurrency)
    results: dict[str, Result] = {}

    async def run_one(check: Check) -> None:
        async with turn:
            late = sum(result.seconds >= timeout for result in results.values())
            if late < MOST_TIMEOUTS:
                result = await run_check(check, probe, timeout)
            else:
                result = Result(check, "skip", "the server no longer answers in time", 0.0)
        results[check.id] = result
        progress(result)

    await asyncio.gather(*(run_one(check) for check in checks if not check.alone))
    for check in checks:
        if check.alone:
            await run_one(check)
    return [results[check.id] for check in checks]


async def run_check(check: Check, probe: Probe, timeout: float) -> Result:
    """Whatever a check raises but its own words is a failure of the server's: it has answered
    something that the check could not even read."""
    begun = time.monotonic()

    def result(outcome: Outcome, detail: str = "") -> Result:
        return Result(check, outcome, brief(detail, 400), time.monotonic() - begun)

    try:
        async with asyncio.timeout(timeout):
            await check.ask(probe)
    except Skipped as reason:
        return result("skip", str(reason))
    except Failed as failure:
        return result("fail", str(failure))
    except TimeoutError:
        return result("fail", f"no end within {timeout:g} s")
    except Exception as error:
        return result("fail", f"{type(error).__name__}: {error}")
    return result("pass")
