"""A request → a job for the engine, and all that its answer says of the request. In any thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import orjson
from pydantic import TypeAdapter

from ruvon.engine.types import Job
from ruvon.errors import ContextLengthError, RequestError
from ruvon.grammars import Grammar, json_object, json_schema
from ruvon.models.chat import Turn
from ruvon.models.formats.tools import Reasoning
from ruvon.server.constraints import grammar_of, two_wishes
from ruvon.server.conversation import Conversation, most_thoughts, prepare_conversation
from ruvon.server.requests import bounded, sampling_params, text_options
from ruvon.server.responses_api.input import AnyItem, ReferenceItem
from ruvon.server.responses_api.items import Transcript, stored
from ruvon.server.responses_api.schemas import (
    ContextFields,
    ResponsesRequest,
    TextFormat,
    TurnFields,
)
from ruvon.server.responses_api.store import StoredItem
from ruvon.server.responses_api.tools import Toolbox, tool_choice, toolbox
from ruvon.server.responses_api.writer import Shape
from ruvon.server.state import Service

LOGPROBS, SEALED = "message.output_text.logprobs", "reasoning.encrypted_content"
KNOWN = frozenset(
    {
        LOGPROBS,
        SEALED,
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
"""Of ``include``. Those beside the first two are about items that are never written here."""

ITEM: TypeAdapter[AnyItem] = TypeAdapter(AnyItem)
Placed: TypeAlias = tuple[AnyItem, str]
"""An item, and its place in the request for errors."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a request builds on: a conversation that is stored, and items that it refers to."""

    history: tuple[StoredItem, ...] = ()
    referenced: Mapping[str, bytes] | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        found = (self.referenced or {}).values()
        return sum(len(item.json) for item in self.history) + sum(map(len, found))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request, understood."""

    job: Job
    turn: Turn
    shape: Shape
    fields: Mapping[str, Any]  # what the response says of the request
    items: tuple[StoredItem, ...]
    skipped: list[str]  # names of what was given and means nothing here
    kept: bool


def prepare(
    request: ResponsesRequest, context: Context, service: Service, max_logprobs: int, *, kept: bool
) -> Prepared:
    """Raises RequestError for all that can be wrong."""
    items = all_items(request, context)
    transcript = transcribe(request, items)
    box = toolbox(request)
    top = bounded(request.top_logprobs, max_logprobs, "top_logprobs")
    shape = _shape(request, box)
    sampling = sampling_params(
        request,
        service,
        max_tokens=request.max_output_tokens,
        logprobs=(top or 0) if shape.logprobs else None,
    )

    def take(conversation: Conversation) -> tuple[Job, Turn]:
        return prepare_conversation(
            conversation,
            sampling,
            service,
            text=text_options(request),
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
        )

    conversation = conversation_of(request, transcript, box, response_grammar(request))
    if request.truncation == "auto":
        job, turn = fitting(conversation, take)
    else:
        job, turn = take(conversation)
    unknown = [
        f"include[{number}]"
        for number, name in enumerate(request.include or ())
        if name not in KNOWN
    ]
    return Prepared(
        job,
        turn,
        shape,
        response_fields(request, job, box, service, kept=kept),
        tuple(keep(items[len(context.history) :])) if kept else (),
        [*skipped(transcript, box, turn), *unknown],
        kept,
    )


def skipped(transcript: Transcript, box: Toolbox, turn: Turn) -> list[str]:
    """Names of what was given and means nothing here."""
    names = {"reasoning_effort": "reasoning.effort"}  # what chat calls it
    fields = [names.get(field, field) for field in turn.ignored]
    return [*transcript.skipped, *box.skipped, *fields]


# ---------------------------------------------------------------------- items and messages


def all_items(request: ContextFields, context: Context) -> list[Placed]:
    """The conversation so far and the request's items, with what references stand for in their
    place. Raises RequestError for one that stands for nothing."""
    found = context.referenced or {}
    items: list[Placed] = [(from_json(one.json), "previous_response_id") for one in context.history]
    for number, item in enumerate(request.input or ()):
        where = f"input[{number}]"
        if not isinstance(item, ReferenceItem):
            items.append((item, where))
        elif item.id in found:
            items.append((from_json(found[item.id]), where))
        else:
            raise RequestError(
                f"Item with id '{item.id[:100]}' not found.", f"{where}.id", "item_not_found"
            )
    return items


def from_json(item: bytes) -> AnyItem:
    """An item that was stored."""
    return ITEM.validate_python(orjson.loads(item))


def transcribe(request: ContextFields, items: Iterable[Placed]) -> Transcript:
    """Instructions and items as messages."""
    transcript = Transcript(request.instructions)
    for item, where in items:
        transcript.add(item, where)
    if not transcript.messages:
        raise RequestError("There is nothing to answer.", "input")
    return transcript


def keep(items: Iterable[Placed]) -> Iterator[StoredItem]:
    """Items as they are stored."""
    for item, _ in items:
        if (fields := stored(item)) is not None:
            yield StoredItem(fields["id"], orjson.dumps(fields))


def conversation_of(
    request: TurnFields, transcript: Transcript, box: Toolbox, response: Grammar | None = None
) -> Conversation:
    """What is asked of the model; ``response`` is what the answer's text must be."""
    return Conversation(
        transcript.messages,
        tools=box.tools,
        choice=tool_choice(request, box),
        response=response,
        reasoning=Reasoning(
            most_thoughts(request.thinking_token_budget),
            request.enable_thinking,
            request.reasoning.effort if request.reasoning else None,
            "reasoning.effort",
        ),
        kwargs=request.chat_template_kwargs,
        param="input",
    )


def response_grammar(request: ResponsesRequest) -> Grammar | None:
    """What the answer's text must be; None: any text. Raises RequestError for two wishes."""
    other = grammar_of(request)
    form = None if request.text is None else request.text.format
    if form is None or form.type == "text":
        return other
    if other is not None:
        raise two_wishes("text.format", other.param)
    if form.schema_ is None:
        return json_object("text.format")
    return json_schema(
        form.schema_,
        strict=bool(form.strict),
        param="text.format.schema",
        name=form.name,
        description=form.description,
    )


def fitting(
    conversation: Conversation, take: Callable[[Conversation], tuple[Job, Turn]]
) -> tuple[Job, Turn]:
    """The conversation, or as many of its last messages as fit after its instructions. An answer
    to a call stays with the call."""
    try:
        return take(conversation)
    except ContextLengthError as error:
        too_long = error
    messages = conversation.messages
    begins = [at for at, one in enumerate(messages) if one["role"] in ("user", "assistant")]
    head = messages[: begins[0] if begins else 0]
    fits: tuple[Job, Turn] | None = None
    least, most = 1, len(begins)  # of those that may begin, so many go
    while least < most:
        number = (least + most) // 2
        kept = [*head, *messages[begins[number] :]]
        try:
            fits, most = take(replace(conversation, messages=kept)), number
        except ContextLengthError:
            least = number + 1
    if fits is None:
        raise too_long
    return fits


# ---------------------------------------------------------------------- what the response says


def _shape(request: ResponsesRequest, box: Toolbox) -> Shape:
    include = request.include or ()
    reasoning = request.reasoning
    summary = reasoning and (reasoning.summary or reasoning.generate_summary)
    return Shape(
        logprobs=LOGPROBS in include or bool(request.top_logprobs),
        summary=summary is not None,
        sealed=SEALED in include,
        background=bool(request.background),
        max_tool_calls=request.max_tool_calls,
        names=box.names,
    )


def response_fields(
    request: ResponsesRequest, job: Job, box: Toolbox, service: Service, *, kept: bool
) -> dict[str, Any]:
    """What a response says of its request, each as JSON that is written once."""
    sampling = job.sampling
    choice = request.tool_choice or "auto"
    form = request.text.format if request.text else None
    reasoning = request.reasoning
    fields = {
        "background": bool(request.background),
        "frequency_penalty": sampling.frequency_penalty,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": request.model or service.names[0],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "presence_penalty": sampling.presence_penalty,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning else None,
            "summary": (reasoning.summary or reasoning.generate_summary) if reasoning else None,
        },
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": kept,
        "temperature": sampling.temperature,
        "text": {"format": _format(form)},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
        "tools": box.told,
        "top_logprobs": request.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": request.truncation or "disabled",
        "user": request.user,
    }
    return {name: orjson.Fragment(orjson.dumps(value)) for name, value in fields.items()}


def _format(form: TextFormat | None) -> dict[str, Any]:
    if form is None or form.schema_ is None:
        return {"type": "text" if form is None else form.type}
    return {
        "type": form.type,
        "name": form.name or "response",
        "description": form.description,
        "schema": form.schema_,
        "strict": bool(form.strict),
    }
