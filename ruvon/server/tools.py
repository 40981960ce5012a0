"""The tools of a chat request as formats take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ruvon.errors import RequestError
from ruvon.grammars import check_strict
from ruvon.models.formats.tools import Tool, ToolChoice, syntax_of
from ruvon.server.schemas.base import missing
from ruvon.server.schemas.tools import (
    AllowedTools,
    ChoiceField,
    CustomField,
    FunctionField,
    ToolField,
)


def tools_of(fields: Sequence[ToolField] | None) -> tuple[Tool, ...]:
    """What is offered. Raises RequestError."""
    return distinct([_tool(field, f"tools[{i}]") for i, field in enumerate(fields or ())])


def distinct(tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """The same; raises RequestError if two have one name."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            raise RequestError(f"There are two tools named '{tool.name}'.", f"tools[{index}]")
        names.add(tool.name)
    return tuple(tools)


def _tool(field: ToolField, param: str) -> Tool:
    if field.type == "function":
        if field.function is None:
            raise missing(f"{param}.function")
        return _function(field.function, f"{param}.function")
    if field.custom is None:
        raise missing(f"{param}.custom")
    return _custom(field.custom, f"{param}.custom")


def _function(field: FunctionField, param: str) -> Tool:
    param, strict = f"{param}.parameters", bool(field.strict)
    if strict and field.parameters is not None:
        check_strict(field.parameters, param)
    return Tool(field.name, field.description, field.parameters, strict, param=param)


def _custom(field: CustomField, param: str) -> Tool:
    syntax = None
    if field.format is not None and field.format.type == "grammar":
        if (given := field.format.grammar) is None:
            raise missing(f"{param}.format.grammar")
        syntax = syntax_of(given.syntax, given.definition, f"{param}.format.grammar.definition")
    return Tool(field.name, field.description, custom=True, syntax=syntax, param=param)


def choice_of(field: ChoiceField | None, parallel: bool | None) -> ToolChoice:
    """Which of the tools may or must be called. Raises RequestError."""
    several = parallel is not False
    if field is None:
        return ToolChoice(parallel=several)
    if field.type in ("none", "auto", "required"):
        return ToolChoice(field.type, (), several)
    if (given := getattr(field, field.type)) is None:
        raise missing(f"tool_choice.{field.type}")
    if isinstance(given, AllowedTools):
        return ToolChoice(given.mode, tuple(_allowed(given)), several)
    return ToolChoice("required", (given.name,), parallel=False)


def _allowed(given: AllowedTools) -> Iterator[str]:
    """The names of the allowed tools."""
    for index, tool in enumerate(given.tools):
        if (named := getattr(tool, tool.type)) is None:
            raise missing(f"tool_choice.allowed_tools.tools[{index}].{tool.type}")
        yield named.name
