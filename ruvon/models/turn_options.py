"""How messages are made a prompt: what every way of chatting is told, and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypedDict, Unpack

from ruvon.errors import RequestError
from ruvon.grammars import Grammar
from ruvon.models.formats.tools import Reasoning, Tool, ToolChoice, Turn
from ruvon.models.messages import Message


class TurnOptions(TypedDict, total=False):
    """How to render messages. The generation prompt opens the assistant's turn; it is added unless
    told otherwise or the final message is to be continued. ``kwargs`` are further variables of the
    template."""

    documents: Sequence[Mapping[str, Any]] | None
    add_generation_prompt: bool | None
    continue_final_message: bool
    kwargs: Mapping[str, Any] | None


class Options(TurnOptions, total=False):
    """The same, with tools in OpenAI's form."""

    tools: Sequence[Mapping[str, Any]] | None


RESERVED = frozenset({"messages", *Options.__annotations__} - {"kwargs"})


class Chat(Protocol):
    """One model's way of chatting: by its template, or in harmony."""

    @property
    def reasons(self) -> bool:
        """Whether the model marks what it thinks before it answers."""

    def reads(self, variable: str) -> bool:
        """Whether ``variable`` of ``chat_template_kwargs`` has an effect."""

    def stop_ids(self, declared: Sequence[int]) -> tuple[int, ...]:
        """The tokens that end an answer, given those that the model's files declare."""

    def turn(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        choice: ToolChoice | None = None,
        response: Grammar | None = None,
        reasoning: Reasoning | None = None,
        **options: Unpack[TurnOptions],
    ) -> Turn:
        """The answer to a conversation: its prompt, its parser and its grammar. ``response`` is the
        form of an answer that calls no tool. Raises RequestError."""

    def render(self, messages: Sequence[Message], **options: Unpack[Options]) -> str:
        """The prompt as text. Raises RequestError."""

    def encode(self, messages: Sequence[Message], **options: Unpack[Options]) -> list[int]:
        """The prompt as ids. Special tokens that the request spells stay text."""


def check_options(messages: Sequence[Message], options: TurnOptions) -> bool:
    """Whether the generation prompt is to be added. Raises RequestError for options that
    contradict, and for no messages."""
    if taken := RESERVED.intersection(options.get("kwargs") or ()):
        raise RequestError(f"{min(taken)} is a field of its own", param="chat_template_kwargs")
    adds, continues = options.get("add_generation_prompt"), options.get("continue_final_message")
    if adds and continues:
        raise RequestError(
            "add_generation_prompt and continue_final_message exclude each other",
            param="continue_final_message",
        )
    if not messages:
        raise RequestError("there must be at least one message", param="messages")
    return not continues if adds is None else adds


def as_called(choice: ToolChoice | None) -> ToolChoice:
    """A choice; who names one tool wants one call."""
    choice = choice or ToolChoice()
    named = choice.mode == "required" and len(choice.names) == 1
    return replace(choice, parallel=False) if named else choice
