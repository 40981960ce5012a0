"""Tools that the model may call, and which of them it must."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ruvon.server.schemas.base import Fields

MODES = ("none", "auto", "required")

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]


class FunctionField(Fields):
    """A function, whose arguments are JSON."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class GrammarField(Fields):
    """A grammar for a custom tool's input."""

    syntax: Literal["lark", "regex"]
    definition: Annotated[str, Field(min_length=1, max_length=1 << 19)]


class CustomFormat(Fields):
    """What a custom tool's input looks like."""

    type: Literal["text", "grammar"]
    grammar: GrammarField | None = None


class CustomField(Fields):
    """A tool whose input is text."""

    name: ToolName
    description: str | None = None
    format: CustomFormat | None = None


class ToolField(Fields):
    """One of ``tools``; the field named like the type says the rest."""

    type: Literal["function", "custom"]
    function: FunctionField | None = None
    custom: CustomField | None = None


class Named(Fields):
    """A tool that was declared."""

    name: str


class NamedTool(Fields):
    """A tool among those that are allowed."""

    type: Literal["function", "custom"]
    function: Named | None = None
    custom: Named | None = None


class AllowedTools(Fields):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=1024)]


class ChoiceField(Fields):
    """``tool_choice`` as an object."""

    type: Literal["none", "auto", "required", "function", "custom", "allowed_tools"]
    function: Named | None = None
    custom: Named | None = None
    allowed_tools: AllowedTools | None = None


def as_choice(value: object) -> object:
    """``"auto"`` → ``{"type": "auto"}``."""
    if value in MODES:
        return {"type": value}
    if isinstance(value, dict):
        return value
    raise PydanticCustomError("choice", "Input should be 'none', 'auto', 'required' or an object")


Tools = Annotated[list[ToolField], Field(fail_fast=True, max_length=1024)]
ToolChoiceField = Annotated[
    ChoiceField,
    BeforeValidator(
        as_choice, json_schema_input_type=Literal["none", "auto", "required"] | ChoiceField
    ),
]
