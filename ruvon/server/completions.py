"""``POST /v1/completions``: text in, text out."""

from __future__ import annotations

from aiohttp import web

from ruvon.models.chat import PlainParser
from ruvon.server.generation import Generation
from ruvon.server.parsing import parse
from ruvon.server.requests import prepare_completion
from ruvon.server.schemas import CompletionRequest
from ruvon.server.state import STATE
from ruvon.server.writers.completions import CompletionsWriter


async def completions(http: web.Request) -> web.StreamResponse:
    """Complete one or several prompts."""
    state = http.app[STATE]
    service = state.ready()
    await service.generator.admission()
    request, ignored = parse(CompletionRequest, await http.read(), state.server.strict)
    service.check_model(request.model)
    jobs = await prepare_completion(request, service, state.server.max_logprobs)
    writer = CompletionsWriter(request, jobs, service)
    return await Generation(service, jobs, writer, PlainParser).send(http, request, ignored)
