"""A request's body: received within bounds, and understood off the event loop where it is large."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from aiohttp import web

from ruvon.engine.preparation import NotCompiledError
from ruvon.models.template_cost import PATIENCE, SlowTemplateError
from ruvon.server.parsing import SMALL
from ruvon.server.receive import receive
from ruvon.server.state import STATE, Service, service_of
from ruvon.server.threads import Aside

T = TypeVar("T")

HURRY = 0.02  # seconds that the event loop's thread can spare for one template
USUAL = sys.getswitchinterval()  # not asked for later: readers of two servers may overlap
PATIENT = 0.0005  # seconds that the event loop's thread waits for the interpreter, in `politely`
TURN = 0.002  # seconds after which others have their turn before a request goes on


READER = web.AppKey("reader", Aside)
"""The thread that reads large bodies. One, for each that works takes its turn at the interpreter's
lock before the event loop does."""

COMPILER = web.AppKey("compiler", Aside)
"""The thread that waits for grammars to be compiled: bodies do not wait behind them."""


async def read(
    http: web.Request, understand: Callable[[bytes, Service], T], *, always_aside: bool = False
) -> T:
    """The request's body, understood; where that takes long, as it may ``always`` or for a large
    body, not on the event loop's thread."""
    service = service_of(http)
    await service.generator.admission(service.tenant)
    pieces = await receive(http)
    large = always_aside or sum(map(len, pieces)) > SMALL
    return await offload(http.app, large, lambda: understand(b"".join(pieces), service))


async def offload(app: web.Application, large: bool, work: Callable[[], T]) -> T:
    """Do ``work``, in the reader's thread if it is ``large``, or turns out to be. If it needs
    grammars that are new here, it is done again when they are compiled."""
    held: list[object] = []  # not to be forgotten until they are used
    while True:
        try:
            if large:
                return await app[READER].run(partial(politely, work))
            began = time.perf_counter()
            result = in_a_hurry(work)
            if time.perf_counter() - began > TURN:
                await asyncio.sleep(0)
            return result
        except SlowTemplateError:
            large = True
            continue
        except NotCompiledError as error:
            compile = partial(app[STATE].ready().generator.preparation.compile, error.grammars)
        held += await app[COMPILER].run(compile)


def politely(work: Callable[[], T]) -> T:
    """Do ``work`` in a thread that leaves the interpreter to the event loop's soon after it asks:
    one turn of the loop asks several times, and would wait for so many of Python's 5 ms."""
    sys.setswitchinterval(PATIENT)
    try:
        return work()
    finally:
        sys.setswitchinterval(USUAL)


def in_a_hurry(work: Callable[[], T]) -> T:
    """Do ``work`` on the event loop's thread. Raises `SlowTemplateError` if that takes too long."""
    token = PATIENCE.set(HURRY)
    try:
        return work()
    finally:
        PATIENCE.reset(token)
