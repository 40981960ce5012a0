"""One message of a chat, and what it may hold."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import BeforeValidator, Field

from ruvon.server.schemas.base import Fields, as_parts


class TextPart(Fields):
    """One part of a message's content; images and sounds are not served."""

    type: Literal["text"]
    text: str


Parts = Annotated[
    list[TextPart],
    Field(fail_fast=True, max_length=1024),
    BeforeValidator(as_parts, json_schema_input_type=str | list[TextPart]),
]


def as_json(value: object) -> object:
    """``{"a": 1}`` → ``'{"a":1}'``."""
    return orjson.dumps(value).decode() if isinstance(value, dict) else value


Arguments = Annotated[str, BeforeValidator(as_json, json_schema_input_type=str | dict[str, Any])]


class FunctionCall(Fields):
    """The function a past assistant message called; ``arguments`` is JSON in a string, or, as some
    clients have it, the object itself."""

    name: str
    arguments: Arguments = "{}"


class CustomCall(Fields):
    """The custom tool a past assistant message called."""

    name: str
    input: str


class ToolCall(Fields):
    """A tool call in a past assistant message; the field named like the type says the rest."""

    id: str | None = None
    type: Literal["function", "custom"] = "function"
    function: FunctionCall | None = None
    custom: CustomCall | None = None

    def for_template(self) -> dict[str, Any]:
        """The call as a format reads it."""
        return self.model_dump(include={"id", "type", self.type})


class Message(Fields):
    """One message of a chat, of any role."""

    UNSERVED: ClassVar[frozenset[str]] = frozenset({"audio", "function_call", "images"})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Parts | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=128)] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None

    @property
    def text(self) -> str:
        """The content as one string, parts on lines of their own; what an assistant has said
        instead, if that was a refusal."""
        if self.content is None:
            return self.refusal or ""
        return "\n".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        reasoning = self.reasoning or self.reasoning_content
        if reasoning:
            message["reasoning_content"] = reasoning
        return message
