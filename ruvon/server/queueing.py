"""The way of a request's jobs into the engine's queue: in its time, and at its key's expense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from aiohttp import web

from ruvon.engine.stream import Stream
from ruvon.engine.types import Emission, Job
from ruvon.server.deadlines import remaining
from ruvon.server.keys import KEYS, TENANT
from ruvon.server.middleware import FACTS
from ruvon.server.rate_limits import LIMITS
from ruvon.server.state import Service
from ruvon.server.work import REQUESTS, WORK, Work


def queue(http: web.Request, service: Service, jobs: Sequence[Job], answer_id: str = "") -> Stream:
    """Queue jobs, or raise why not; their prompts count as spent. ``answer_id`` is what the client
    knows the request by, besides its id."""
    weight = http.app[KEYS].weight(http[TENANT])
    if weight != 1:
        jobs = [replace(job, weight=weight) for job in jobs]
    stream = service.generator.generate(jobs, remaining(http))
    http.app[LIMITS].spend(http[TENANT], sum(len(job.prompt) for job in jobs))
    work = http[WORK] = http.get(WORK) or Work(jobs[0])
    work.streams.append(stream)
    names = (http[FACTS]["request_id"], answer_id)
    http.app[REQUESTS].remember(http[TENANT], names, work.streams)
    return stream


def spender(http: web.Request) -> Callable[[Iterable[Emission]], None]:
    """What counts a request's new tokens as spent."""
    limits, tenant = http.app[LIMITS], http[TENANT]
    return lambda emissions: limits.spend(tenant, sum([len(each.tokens) for each in emissions]))
