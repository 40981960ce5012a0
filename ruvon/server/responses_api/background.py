"""Responses that run whether somebody listens or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import structlog
from aiohttp import web

from ruvon.server.events import log_failure
from ruvon.server.generation import Generation
from ruvon.server.responses_api.store import RESPONSES, Stored
from ruvon.server.responses_api.writer import ResponsesWriter
from ruvon.server.work import times
from ruvon.telemetry.finished import last_of

log = structlog.get_logger(__name__)


async def start(
    app: web.Application, entry: Stored, writer: ResponsesWriter, generation: Generation
) -> None:
    """Run a response to its end. Raises UnavailableError where the store or the engine is full."""
    entry.background, entry.writer = True, writer
    store = app[RESPONSES]
    store.put(entry)
    try:
        events = generation.run()
    except BaseException:
        store.delete(entry.id, entry.owner)
        raise
    entry.task = asyncio.create_task(_run(entry, writer, events))
    await asyncio.sleep(0)  # it has begun, so that whatever ends it frees what it holds


async def _run(entry: Stored, writer: ResponsesWriter, events: AsyncGenerator[bytes, None]) -> None:
    """Nobody reads the events here: the writer records them."""
    try:
        async with aclosing(events):
            async for _ in events:
                pass
    except asyncio.CancelledError:
        writer.cancel()
    except Exception as error:
        writer.error(error)
        log_failure(error)
    finally:
        entry.task = None
        tally = writer.tally
        log.info(
            "background_response",
            id=entry.id,
            status=writer.status,
            prompt_tokens=tally.num_prompt,
            output_tokens=tally.num_output,
            **times(last_of(tally.finished)),
        )


async def stop(entry: Stored) -> None:
    """End a response that still runs."""
    if entry.task is not None:
        task = entry.task
        task.cancel()
        await asyncio.wait([task])


async def end_background(app: web.Application) -> None:
    """End all of them."""
    if tasks := app[RESPONSES].tasks():
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
