"""Jobs whose whole answer is one emission each: scores, probabilities, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing

from aiohttp import web

from ruvon.engine.types import Emission, Job
from ruvon.server.generation import check_end
from ruvon.server.queueing import queue, spender
from ruvon.server.state import Service


async def collect(http: web.Request, service: Service, jobs: Sequence[Job]) -> list[Emission]:
    """Run jobs that end with their first emission; theirs, in order. Whichever way this is left,
    it frees what the jobs held. Raises `UnavailableError` if the engine gives one up."""
    found: dict[int, Emission] = {}
    spend = spender(http)
    async with aclosing(queue(http, service, jobs)) as source:
        async for emissions in source:
            spend(emissions)
            for emission in emissions:
                check_end(emission.finish, emission.error)
                found[emission.index] = emission
    return [found[index] for index in range(len(jobs))]
