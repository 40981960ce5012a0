"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from ruvon.engine.types import Job
from ruvon.models.chat import Turn
from ruvon.server.conversation import prepare_conversation, take_turn, without_effect
from ruvon.server.events import EVENTS
from ruvon.server.generation import Generation, ignored_header
from ruvon.server.messages_api.convert import LeftOut, convert
from ruvon.server.messages_api.schemas import CountRequest, MessagesRequest
from ruvon.server.messages_api.writer import MessagesWriter
from ruvon.server.middleware import FACTS, json_response
from ruvon.server.parsing import MAX_IGNORED
from ruvon.server.requests import read_request, sampling_params, text_options
from ruvon.server.schemas import SamplingFields
from ruvon.server.state import Service, service_of

NAMES = {
    "thinking_token_budget": "thinking.budget_tokens",
    "enable_thinking": "thinking.type",
    "reasoning_effort": "output_config.effort",
}
"""What formats call what a template has no use for → Anthropic's fields."""


async def messages(http: web.Request) -> web.StreamResponse:
    """Answer a conversation."""
    service = service_of(http)
    request, ignored, (job, turn, left_out) = await read_request(http, MessagesRequest, prepare)
    ignored = all_without_effect(http, ignored, turn, left_out)
    writer = MessagesWriter(request, job, service, http[FACTS]["request_id"])
    generation = Generation(http, service, [job], writer, turn.parser)
    media = EVENTS._replace(beat=writer.beat)
    return await generation.send(stream=bool(request.stream), ignored=ignored, media=media)


def prepare(
    request: MessagesRequest, service: Service, max_logprobs: int
) -> tuple[Job, Turn, LeftOut]:
    """What the engine is to do, how its answer is read, and what it was not told."""
    conversation, left_out = convert(request)
    fields = SamplingFields(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        stop=request.stop_sequences,
    )
    sampling = sampling_params(fields, service, max_tokens=request.max_tokens)
    text = text_options(fields)
    return *prepare_conversation(conversation, sampling, service, text=text), left_out


async def count_tokens(http: web.Request) -> web.Response:
    """How long the prompt of a conversation is."""
    _, ignored, (turn, left_out) = await read_request(http, CountRequest, count)
    ignored = all_without_effect(http, ignored, turn, left_out)
    return json_response({"input_tokens": len(turn.prompt)}, headers=ignored_header(ignored))


def count(request: CountRequest, service: Service, max_logprobs: int) -> tuple[Turn, LeftOut]:
    conversation, left_out = convert(request)
    return take_turn(conversation, service), left_out


def all_without_effect(
    http: web.Request, fields: Sequence[str], turn: Turn, left_out: LeftOut
) -> list[str]:
    """The names of all that has no effect. Raises RequestError where the server is strict, and it
    is more than what changes with every request."""
    unread = [NAMES.get(name, name) for name in turn.ignored]
    lost = without_effect(http, fields, [*left_out.foreign, *unread])
    return [*lost, *left_out.volatile][:MAX_IGNORED]
