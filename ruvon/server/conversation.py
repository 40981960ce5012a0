"""What every chat-like API asks for, in one form, and the job that it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ruvon.engine.types import Job, SamplingParams, TextOptions
from ruvon.errors import RequestError
from ruvon.grammars import Grammar
from ruvon.models.chat import Turn
from ruvon.models.formats.tools import Reasoning, Tool, ToolChoice
from ruvon.server.requests import check_size
from ruvon.server.state import Service

ANY_CALL = ToolChoice()
AS_USUAL = Reasoning()
ALL_TEXT = TextOptions()


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
    check_size(sum(len(message["content"]) for message in asked.messages), service, asked.param)
    try:
        return service.chat.turn(
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
    return service.generator.prepare(job), turn
