"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from aiohttp import web

from ruvon.engine.types import Job
from ruvon.errors import RequestError
from ruvon.models.chat import Turn
from ruvon.server.body import read
from ruvon.server.conversation import Conversation, prepare_conversation, take_turn
from ruvon.server.events import EVENTS
from ruvon.server.generation import Generation, ignored_header
from ruvon.server.messages_api.convert import convert
from ruvon.server.messages_api.schemas import CountRequest, MessagesRequest, PromptFields
from ruvon.server.messages_api.writer import MessagesWriter
from ruvon.server.middleware import FACTS, json_response
from ruvon.server.parsing import MAX_IGNORED
from ruvon.server.requests import read_fields, sampling_params, text_options
from ruvon.server.schemas import SamplingFields
from ruvon.server.state import STATE, Service

P = TypeVar("P", bound=PromptFields)


async def messages(http: web.Request) -> web.StreamResponse:
    """Answer a conversation."""
    service = http.app[STATE].ready()
    strict = http.app[STATE].server.strict

    def understand(
        body: bytes, service: Service
    ) -> tuple[MessagesRequest, Sequence[str], Job, Turn]:
        request, conversation, ignored = understood(MessagesRequest, body, service, strict)
        return request, ignored, *prepare(request, conversation, service)

    request, ignored, job, turn = await read(http, understand)
    writer = MessagesWriter(request, job, service, http[FACTS]["request_id"])
    generation = Generation(service, [job], writer, turn.parser)
    media = EVENTS._replace(beat=writer.beat)
    return await generation.send(http, stream=bool(request.stream), ignored=ignored, media=media)


async def count_tokens(http: web.Request) -> web.Response:
    """How long the prompt of a conversation is."""
    strict = http.app[STATE].server.strict

    def understand(body: bytes, service: Service) -> tuple[int, Sequence[str]]:
        _, conversation, ignored = understood(CountRequest, body, service, strict)
        return len(take_turn(conversation, service).prompt), ignored

    num_tokens, ignored = await read(http, understand)
    return json_response({"input_tokens": num_tokens}, headers=ignored_header(ignored))


def understood(
    kind: type[P], body: bytes, service: Service, strict: bool
) -> tuple[P, Conversation, Sequence[str]]:
    """The request, what the model is told of it, and the names of what has no effect."""
    request, ignored = read_fields(kind, body, service, strict)
    conversation, left_out = convert(request)
    if strict and left_out.foreign:
        name = left_out.foreign[0]
        raise RequestError(f"'{name}' is not served.", name, "unsupported_parameter")
    names = [*ignored, *left_out.foreign, *left_out.volatile]
    return request, conversation, names[:MAX_IGNORED]


def prepare(
    request: MessagesRequest, conversation: Conversation, service: Service
) -> tuple[Job, Turn]:
    """What the engine is to do."""
    fields = SamplingFields(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        stop=request.stop_sequences,
    )
    sampling = sampling_params(fields, service, max_tokens=request.max_tokens)
    return prepare_conversation(conversation, sampling, service, text=text_options(fields))
