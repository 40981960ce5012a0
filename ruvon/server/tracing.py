"""A request that is over, in OpenTelemetry's words (`ruvon.telemetry.tracing` tells it)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from aiohttp import web

from ruvon.engine.types import Job
from ruvon.server.state import STATE
from ruvon.server.threads import in_thread
from ruvon.server.work import WORK
from ruvon.telemetry.tracing import Call, Tracing

GOODBYE = 5.0  # seconds for what is left to be sent, when the server ends

OPERATIONS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/decisions": "chat",
    "/v1/embeddings": "embeddings",
    "/api/chat": "chat",
    "/api/generate": "text_completion",
}
"""What is traced, by route."""

SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty",
)  # fmt: skip
"""Of `SamplingParams`, which have the same names under ``gen_ai.request``."""

FACTS: Mapping[str, str] = {
    "id": "gen_ai.response.id",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "tenant": "ruvon.tenant",
}
"""Of a log line."""

TRACING = web.AppKey("tracing", Tracing)


async def close_tracing(app: web.Application) -> None:
    """Send what is left, for so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(GOODBYE):
            await in_thread(app[TRACING].close, "ruvon-traces")


def trace(
    http: web.Request,
    route: str,
    facts: Mapping[str, Any],
    status: int,
    began_at: float,
    seconds: float,
) -> str | None:
    """Tell of a request, if its ``route`` is one that is traced; returns its trace's id. ``facts``
    are those of its log line."""
    operation = OPERATIONS.get(route)
    if operation is None or TRACING not in http.app:
        return None
    service, work = http.app[STATE].service, http.get(WORK)
    call = Call(
        operation=operation,
        model=service.names[0] if service else "",
        headers=http.headers,
        began_at=began_at,
        seconds=seconds,
        error=facts.get("error") or (str(status) if status >= 400 else None),
        finished=None if work is None else work.finished,
        attributes={
            "http.request.method": http.method,
            "url.path": http.path[:200],
            "http.response.status_code": status,
            "ruvon.request_id": facts["request_id"],
            **attributes_of(facts),
            **({} if work is None else attributes_of_job(work.job)),
        },
    )
    return http.app[TRACING].record(call)


def attributes_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of what the log line says."""
    told = {name: facts[fact] for fact, name in FACTS.items() if fact in facts}
    if "finish" in facts:
        told["gen_ai.response.finish_reasons"] = [facts["finish"]]
    return told


def attributes_of_job(job: Job) -> dict[str, Any]:
    """How tokens were to be drawn; nothing of what was asked or answered."""
    sampling = job.sampling
    told = {f"gen_ai.request.{name}": getattr(sampling, name) for name in SAMPLING}
    told["gen_ai.request.choice.count"] = job.n
    if job.text.stop:
        told["gen_ai.request.stop_sequences"] = list(job.text.stop)
    return {name: value for name, value in told.items() if value is not None}
