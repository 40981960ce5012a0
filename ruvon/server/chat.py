"""``POST /v1/chat/completions``: messages in, an assistant's message out."""

from __future__ import annotations

from dataclasses import replace

from aiohttp import web

from ruvon.engine.types import Job
from ruvon.errors import RequestError
from ruvon.models.chat import Turn
from ruvon.models.formats.tools import Reasoning
from ruvon.server.constraints import grammar_of
from ruvon.server.conversation import (
    Conversation,
    most_thoughts,
    prepare_conversation,
    prompt_texts,
    truncation,
    without_effect,
)
from ruvon.server.generation import Generation
from ruvon.server.requests import bounded, name_request, read_request, sampling_params, text_options
from ruvon.server.schemas import ChatRequest, TemplateFields
from ruvon.server.state import Service, service_of
from ruvon.server.tools import choice_of, tools_of
from ruvon.server.writers.chat import ChatWriter

BUDGETS = ("thinking_token_budget", "thinking_budget", "reasoning_budget")


async def chat_completions(http: web.Request) -> web.StreamResponse:
    """Answer a chat."""
    service = service_of(http)
    request, ignored, (job, turn) = await read_request(http, ChatRequest, prepare_chat)
    ignored = without_effect(http, ignored, turn.ignored)
    name_request(http, request.request_id)
    texts = await prompt_texts(http, [job] if request.return_prompt_text else [], service)
    writer = ChatWriter(request, job, service, next(iter(texts), None))
    generation = Generation(http, service, [job], writer, turn.parser)
    return await generation.send(stream=bool(request.stream), ignored=ignored)


def prepare_chat(request: ChatRequest, service: Service, max_logprobs: int) -> tuple[Job, Turn]:
    """The one job of a chat, and how its answer is read."""
    logprobs = bounded(request.top_logprobs or 0, max_logprobs, "top_logprobs")
    limits = (request.max_completion_tokens, request.max_tokens)
    max_tokens = min((limit for limit in limits if limit is not None), default=None)
    sampling = sampling_params(
        request,
        service,
        max_tokens=max_tokens,
        logprobs=logprobs if request.logprobs else None,
        logprob_token_ids=request.logprob_token_ids,
        prompt_logprobs=bounded(request.prompt_logprobs, max_logprobs, "prompt_logprobs"),
    )
    job, turn = prepare_conversation(
        chat_of(request),
        sampling,
        service,
        n=request.n or 1,
        text=text_options(request),
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        truncate=truncation(request, max_tokens, service),
    )
    return job, replace(turn, ignored=tuple(as_given(name, request) for name in turn.ignored))


def as_given(name: str, request: ChatRequest) -> str:
    """A field by the name under which the request has it."""
    names = BUDGETS if name in BUDGETS else ()
    return next((each for each in names if getattr(request, each) is not None), name)


def chat_of(request: ChatRequest) -> Conversation:
    """All that a chat asks for."""
    return replace(
        conversation_of(request),
        choice=choice_of(request.tool_choice, request.parallel_tool_calls),
        response=grammar_of(request),
        reasoning=reasoning_of(request),
    )


def conversation_of(request: TemplateFields) -> Conversation:
    """What is rendered of a request."""
    return Conversation(
        messages=[message.for_template() for message in request.messages],
        tools=tools_of(request.tools),
        documents=request.documents,
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=bool(request.continue_final_message),
        kwargs=request.chat_template_kwargs,
    )


def reasoning_of(request: ChatRequest) -> Reasoning:
    """How much to think. Raises RequestError if two fields say how long."""
    given = {name: value for name in BUDGETS if (value := getattr(request, name)) is not None}
    if len(given) > 1:
        first, second = list(given)[:2]
        raise RequestError(f"'{first}' and '{second}' say the same; give one of them.", second)
    return Reasoning(
        most_thoughts(*given.values()), request.enable_thinking, request.reasoning_effort
    )
