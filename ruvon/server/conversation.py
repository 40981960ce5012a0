"""What every chat-like API asks for, in one form, and the job that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from aiohttp import web

from ruvon.engine.types import Job, SamplingParams, TextOptions
from ruvon.errors import RequestError
from ruvon.grammars import Grammar, json_schema
from ruvon.models.chat import Turn
from ruvon.models.formats.tools import Reasoning, Tool, ToolChoice
from ruvon.server.body import offload
from ruvon.server.parsing import MAX_IGNORED
from ruvon.server.requests import check_size
from ruvon.server.schemas import GenerationFields
from ruvon.server.state import STATE, Service

ANY_CALL = ToolChoice()
AS_USUAL = Reasoning()
ALL_TEXT = TextOptions()

MOST_SUSPECTS = 64  # tools, to find which one is to blame
LONG = 1024  # ids that are decoded where others wait


@dataclass(frozen=True, slots=True)
class Truncation:
    """Keep so many of a prompt's tokens, and drop those at this side."""

    tokens: int
    side: Literal["left", "right"] = "left"

    def of(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """What is kept of ``prompt``."""
        if len(prompt) <= self.tokens:
            return prompt
        return prompt[-self.tokens :] if self.side == "left" else prompt[: self.tokens]


def truncation(
    request: GenerationFields, max_tokens: int | None, service: Service
) -> Truncation | None:
    """What a request says of prompts that are too long. -1 leaves room for the completion."""
    tokens = request.truncate_prompt_tokens
    if tokens is None:
        return None
    if tokens < 0:
        tokens = max(service.max_model_len - (1 if max_tokens is None else max_tokens), 1)
    return Truncation(tokens, request.truncation_side or "left")


def most_thoughts(budget: int | None = None) -> int | None:
    """A request's bound on tokens of reasoning: -1 is none."""
    return None if budget is None or budget < 0 else budget


async def prompt_texts(http: web.Request, jobs: Sequence[Job], service: Service) -> list[str]:
    """The prompts as the model reads them, special tokens included."""
    decode = service.tokenizer.decode
    large = sum(len(job.prompt) for job in jobs) > LONG
    return await offload(
        http.app, large, lambda: [decode(job.prompt, skip_special_tokens=False) for job in jobs]
    )


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat to be continued. Messages are OpenAI's: role, content as one text, name, tool_calls
    (``{id, type, function: {name, arguments}}`` or ``{id, type, custom: {name, input}}``),
    tool_call_id, reasoning_content."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Tool] = ()
    choice: ToolChoice = ANY_CALL
    response: Grammar | None = None
    reasoning: Reasoning = AS_USUAL
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    kwargs: Mapping[str, Any] | None = None  # further variables of the template
    at_most: bool = False  # max_tokens may be more than the context holds
    param: str = "messages"  # what errors about the prompt name


def take_turn(conversation: Conversation, service: Service) -> Turn:
    """The prompt, the parser and the grammar of the answer. Raises RequestError."""
    asked = conversation
    if asked.documents and not service.chat.reads("documents"):
        raise RequestError(
            "This model's chat template takes no documents.", "documents", "unsupported_parameter"
        )
    check_size(num_characters(asked), service, asked.param)
    try:
        turn = service.chat.turn(
            asked.messages,
            tools=asked.tools,
            choice=asked.choice,
            response=asked.response,
            reasoning=asked.reasoning,
            documents=asked.documents,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
            kwargs=asked.kwargs,
        )
    except RequestError as error:
        if asked.param != "messages" and (error.param or "").startswith("messages"):
            error.param = asked.param
        raise
    unread = (name for name in asked.kwargs or () if not service.chat.reads(name))
    unread = (f"chat_template_kwargs.{name}"[:100] for name in unread)
    return replace(turn, ignored=(*turn.ignored, *unread))


def num_characters(conversation: Conversation) -> int:
    """Of all texts that a template may render, however deep they lie."""
    count = 0
    pending: list[Any] = [conversation.messages, conversation.documents]
    pending += [(tool.description, tool.parameters) for tool in conversation.tools]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            count += len(value)
        elif isinstance(value, Mapping):
            pending += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            pending += value
    return count


def without_effect(http: web.Request, fields: Sequence[str], found: Sequence[str]) -> list[str]:
    """The names of a request's ``fields`` without effect, and of those ``found`` since to have
    none. Raises RequestError for these where the server is strict."""
    if found and http.app[STATE].server.strict:
        raise RequestError(f"'{found[0]}' has no effect here.", found[0], "unsupported_parameter")
    return [*fields, *found][:MAX_IGNORED]


def prepare_conversation(
    conversation: Conversation,
    sampling: SamplingParams,
    service: Service,
    *,
    n: int = 1,
    text: TextOptions = ALL_TEXT,
    priority: int = 0,
    cache_salt: str = "",
    truncate: Truncation | None = None,
) -> tuple[Job, Turn]:
    """The job of a conversation's next turn, and the turn, whose parser reads what comes of it.
    In any thread. Raises RequestError for all that can be wrong with it."""
    turn = take_turn(conversation, service)
    if (
        conversation.at_most
        and (sampling.max_tokens or 0) + len(turn.prompt) > service.max_model_len
    ):
        sampling = replace(sampling, max_tokens=None)
    job = Job(
        prompt=turn.prompt if truncate is None else truncate.of(turn.prompt),
        sampling=replace(sampling, grammar=turn.grammar),
        text=text,
        n=n,
        priority=priority,
        cache_salt=cache_salt,
        param=conversation.param,
    )
    try:
        return service.prepare(job), turn
    except RequestError as error:
        if error.param == "tools":
            check_each(conversation.tools, job, service)
        raise


def check_each(tools: Sequence[Tool], job: Job, service: Service) -> None:
    """Raise RequestError for the tool of some, no grammar for all of which can be had, that is to
    blame, if one is by itself."""
    suspects = [(tool.parameters, tool.param) for tool in tools[:MOST_SUSPECTS]]
    grammars = [
        json_schema(schema, param=param) for schema, param in suspects if schema is not None
    ]
    service.generator.preparation.check_compiled(grammars)
    for grammar in grammars:
        service.prepare(Job(job.prompt[:1], SamplingParams(grammar=grammar)))
