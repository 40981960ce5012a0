"""``POST /v1/chat/completions``: messages in, an assistant's message out."""

from __future__ import annotations

from aiohttp import web

from ruvon.server.generation import Generation
from ruvon.server.parsing import parse
from ruvon.server.requests import prepare_chat
from ruvon.server.schemas import ChatRequest
from ruvon.server.state import STATE
from ruvon.server.writers.chat import ChatWriter


async def chat_completions(http: web.Request) -> web.StreamResponse:
    """Answer a chat."""
    state = http.app[STATE]
    service = state.ready()
    await service.generator.admission()
    request, ignored = parse(ChatRequest, await http.read(), state.server.strict)
    service.check_model(request.model)
    jobs = await prepare_chat(request, service, state.server.max_logprobs)
    writer = ChatWriter(request, jobs[0], service)
    return await Generation(service, jobs, writer, service.chat.parser).send(http, request, ignored)
