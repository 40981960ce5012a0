"""Ollama's API, for clients that speak nothing else: OpenAI's in other words, as lines of JSON."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TypeAlias

from aiohttp import web
from pydantic import AliasChoices, Field

from ruvon.engine.detokenizer import MakeParser
from ruvon.engine.types import Job
from ruvon.models.chat import PlainParser
from ruvon.server.chat import prepare_chat
from ruvon.server.completions import prepare_completion
from ruvon.server.conversation import without_effect
from ruvon.server.events import Media
from ruvon.server.generation import Generation, ignored_header
from ruvon.server.middleware import FACTS, json_response
from ruvon.server.parsing import parse
from ruvon.server.requests import bounded, read_request
from ruvon.server.schemas import ChatRequest, CompletionRequest, Fields, Message, SamplingFields
from ruvon.server.schemas.base import Int
from ruvon.server.schemas.chat import Effort
from ruvon.server.schemas.messages import Parts
from ruvon.server.schemas.tools import Tools
from ruvon.server.state import Service, service_of
from ruvon.server.writers.ollama import OllamaWriter, timestamp

Body: TypeAlias = dict[str, Any]

VERSION = "0.12.11"  # clients ask for one that is new enough
LINES = Media("application/x-ndjson", lambda: b"")
OF_THINK = ("enable_thinking", "reasoning_effort")  # what it becomes
IDLE = {
    "chat": ("prompt", "system", "raw"),
    "prompt": ("messages",),
    "raw": ("messages", "system", "think", "tools"),
}
"""What a request of each kind may hold that is not read there."""


class Options(SamplingFields):
    """How tokens are drawn: everybody's words, and Ollama's own."""

    UNSERVED = frozenset({"mirostat", "repeat_last_n", "tfs_z"})
    max_tokens: Int | None = Field(default=None, alias="num_predict")
    repetition_penalty: float | None = Field(default=None, alias="repeat_penalty")
    num_ctx: Int | None = None


class OllamaMessage(Message):
    """A message, by Ollama's names for some of it."""

    content: Parts | None = Field(default_factory=list)
    name: str | None = Field(default=None, alias="tool_name")
    reasoning_content: str | None = Field(default=None, alias="thinking")


class OllamaRequest(Fields):
    """``POST /api/chat`` and ``/api/generate``."""

    model: str | None = None
    messages: list[OllamaMessage] | None = None
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    stream: bool | None = None
    format: Literal["json", ""] | Body | None = None
    think: bool | Effort | None = None
    tools: Tools | None = None
    options: Options | None = None


class ShowRequest(Fields):
    """``POST /api/show``."""

    model: str = Field(validation_alias=AliasChoices("model", "name"))


async def tags(http: web.Request) -> web.Response:
    """The served names."""
    service = service_of(http)
    listed = [{"name": n, "model": n, **_card(n, service)} for n in service.names]
    return json_response({"models": listed})


async def show(http: web.Request) -> web.Response:
    """One of them, with what clients look for: the context's length, and what it can do."""
    request, ignored, service = await read_request(http, ShowRequest, lambda _, it, __: it)
    family = service.architecture
    length = {f"{family}.context_length": service.max_model_len}
    shown = _card(request.model.removesuffix(":latest"), service) | {
        "capabilities": ["completion", "tools", *["thinking"] * service.chat.reasons],
        "model_info": {"general.architecture": family, **length},
        "parameters": "\n".join(f"{key} {value}" for key, value in service.defaults.items()),
    }
    return json_response(shown, headers=ignored_header(ignored))


def _card(name: str, service: Service) -> Body:
    family = service.architecture
    unknown = dict.fromkeys(("parent_model", "parameter_size", "quantization_level"), "")
    return {
        "modified_at": timestamp(datetime.fromtimestamp(service.created, UTC)),
        "size": service.weight_bytes,
        "digest": hashlib.sha256(f"{service.fingerprint}{name}".encode()).hexdigest(),
        "details": {"format": service.format, "family": family, "families": [family], **unknown},
    }


async def version(http: web.Request) -> web.Response:
    """The version of Ollama whose API this is."""
    return json_response({"version": VERSION})


async def answer(http: web.Request) -> web.StreamResponse:
    """``POST /api/chat`` and ``/api/generate``. Who asks nothing wants the model to be loaded."""
    is_chat = http.path == "/api/chat"
    understand = partial(prepare, is_chat=is_chat)
    request, ignored, (job, parser, idle) = await read_request(http, OllamaRequest, understand)
    ignored = without_effect(http, ignored, idle)
    service = service_of(http)
    model, jobs = request.model or service.names[0], [] if job is None else [job]
    writer = OllamaWriter(http[FACTS]["request_id"], model, jobs, is_chat=is_chat)
    if not jobs:
        return json_response(writer.line([], {"done_reason": "load"}))
    generation = Generation(http, service, jobs, writer, parser)
    return await generation.send(stream=request.stream is not False, ignored=ignored, media=LINES)


def prepare(
    request: OllamaRequest, service: Service, max_logprobs: int, *, is_chat: bool
) -> tuple[Job | None, MakeParser, list[str]]:
    """The job, if anything is asked; how its answer is read; what has no effect here."""
    kind = "chat" if is_chat else "raw" if request.raw else "prompt"
    ignored = [name for name in IDLE[kind] if getattr(request, name)]
    options = request.options or Options()
    bounded(options.num_ctx, service.max_model_len, "num_ctx")
    common = drawing(options) | form(request.format)
    if not (request.messages if is_chat else request.prompt):
        return None, PlainParser, ignored
    if kind == "raw":
        text, _ = parse(CompletionRequest, common | {"prompt": request.prompt})
        (job,) = prepare_completion(text, service, max_logprobs)
        return job, PlainParser, ignored
    chat, _ = parse(ChatRequest, common | conversation(request, is_chat))
    job, turn = prepare_chat(chat, service, max_logprobs)
    names = dict.fromkeys("think" if name in OF_THINK else name for name in turn.ignored)
    return job, turn.parser, [*ignored, *names]


def drawing(options: Options) -> Body:
    """Options as OpenAI and vLLM name them."""
    known = options.model_fields_set.intersection(Options.model_fields) - {"num_ctx"}
    fields = {name: getattr(options, name) for name in known}
    if (options.max_tokens or 0) < 0:
        del fields["max_tokens"]  # as many as the context holds
    return fields


def form(format: str | Body | None) -> Body:
    """What the answer must be."""
    if format == "json":
        return {"response_format": {"type": "json_object"}}
    return {"json_schema": format} if format else {}


def conversation(request: OllamaRequest, is_chat: bool) -> Body:
    """What is asked of the chat that it is, or becomes."""
    said = {"system": request.system, "user": request.prompt}
    turns = [{"role": role, "content": text} for role, text in said.items() if text]
    effort = request.think if isinstance(request.think, str) else None
    return {
        "messages": request.messages if is_chat else turns,
        "tools": request.tools,
        "enable_thinking": None if request.think is None else bool(request.think),
        "reasoning_effort": effort,
    }
