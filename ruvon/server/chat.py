"""``POST /v1/chat/completions``: messages in, an assistant's message out."""

from __future__ import annotations

from aiohttp import web

from ruvon.server.generation import Generation
from ruvon.server.requests import prepare_chat, read_jobs
from ruvon.server.schemas import ChatRequest
from ruvon.server.state import STATE
from ruvon.server.writers.chat import ChatWriter


async def chat_completions(http: web.Request) -> web.StreamResponse:
    """Answer a chat."""
    service = http.app[STATE].ready()
    request, ignored, jobs = await read_jobs(http, ChatRequest, prepare_chat)
    writer = ChatWriter(request, jobs[0], service)
    return await Generation(service, jobs, writer, service.chat.parser).send(http, request, ignored)
