"""``POST /v1/completions``: text in, text out."""

from __future__ import annotations

from aiohttp import web

from ruvon.models.chat import PlainParser
from ruvon.server.generation import Generation
from ruvon.server.requests import prepare_completion, read_jobs
from ruvon.server.schemas import CompletionRequest
from ruvon.server.state import STATE
from ruvon.server.writers.completions import CompletionsWriter


async def completions(http: web.Request) -> web.StreamResponse:
    """Complete one or several prompts."""
    service = http.app[STATE].ready()
    request, ignored, jobs = await read_jobs(http, CompletionRequest, prepare_completion)
    writer = CompletionsWriter(request, jobs, service)
    return await Generation(service, jobs, writer, PlainParser).send(http, request, ignored)
