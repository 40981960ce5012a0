"""``POST /v1/chat/completions``: messages in, an assistant's message out."""

from __future__ import annotations

from aiohttp import web

from ruvon.engine.types import Job
from ruvon.models.chat import Turn
from ruvon.server.conversation import Conversation, prepare_conversation
from ruvon.server.generation import Generation
from ruvon.server.requests import bounded, read_request, sampling_params, text_options
from ruvon.server.schemas import ChatRequest, TemplateFields
from ruvon.server.state import STATE, Service
from ruvon.server.writers.chat import ChatWriter


async def chat_completions(http: web.Request) -> web.StreamResponse:
    """Answer a chat."""
    service = http.app[STATE].ready()
    request, ignored, (job, turn) = await read_request(http, ChatRequest, prepare_chat)
    writer = ChatWriter(request, job, service)
    generation = Generation(service, [job], writer, turn.parser)
    return await generation.send(http, stream=bool(request.stream), ignored=ignored)


def prepare_chat(request: ChatRequest, service: Service, max_logprobs: int) -> tuple[Job, Turn]:
    """The one job of a chat, and how its answer is read."""
    logprobs = bounded(request.top_logprobs or 0, max_logprobs, "top_logprobs")
    sampling = sampling_params(
        request,
        service,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        logprobs=logprobs if request.logprobs else None,
        prompt_logprobs=bounded(request.prompt_logprobs, max_logprobs, "prompt_logprobs"),
    )
    return prepare_conversation(
        conversation_of(request),
        sampling,
        service,
        n=request.n or 1,
        text=text_options(request),
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
    )


def conversation_of(request: TemplateFields) -> Conversation:
    """What a request's messages ask for."""
    return Conversation(
        messages=[message.for_template() for message in request.messages],
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        kwargs=request.chat_template_kwargs,
    )
