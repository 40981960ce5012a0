"""What a client offers a model to call, what it asks of the answer, and the answer to be given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ruvon.deltas import Delta
from ruvon.errors import RequestError
from ruvon.grammars import Grammar, lark, regex
from ruvon.models.text_stream import TextStream

ANY_OBJECT: Mapping[str, Any] = {"type": "object", "properties": {}}
NO_ARGUMENTS: Mapping[str, Any] = {**ANY_OBJECT, "required": [], "additionalProperties": False}
INPUT = "input"  # the one argument as which a custom tool's input is written where calls are JSON


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call, or a custom tool, which takes text."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = (
        None  # JSON schema of the arguments; None: any object, or {} where `strict`
    )
    strict: bool = False  # calls match the schema even where the model is free to call or not
    custom: bool = False
    syntax: Grammar | None = None  # of a custom tool's input
    param: str = "tools"  # the request's field that errors name


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether tools are called, and which."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] = ()  # only these; empty: all
    parallel: bool = True  # False: at most one call

    def among(self, tools: Sequence[Tool]) -> tuple[Tool, ...]:
        """The tools that may be called."""
        if self.mode == "none":
            return ()
        return tuple(tool for tool in tools if not self.names or tool.name in self.names)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How much a model is to think before it answers; None leaves it to the model's template."""

    budget: int | None = None  # most tokens; then the answer is begun for it
    enabled: bool | None = None
    effort: str | None = None
    param: str = "reasoning_effort"  # the request's field that errors about the effort name


class Parser(Protocol):
    """Reads one completion's ids as they come; any chunking of the same ids adds up to the same.

    It is made with the `TextStream` through which all its ids become text, that it may hold back
    what is undecided, and end at a stop string. It says what the completion says (text, reasoning,
    tool calls), how many tokens were reasoning, and leaves the other fields of a `Delta` alone.
    """

    def push(self, ids: Sequence[int]) -> list[Delta]: ...

    def finish(self) -> list[Delta]:
        """What was held back, once no more ids come."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer to be given: what the model reads, what it must write, and how to read that.

    ``ignored`` names what of the request this model's template has no use for.
    """

    prompt: tuple[int, ...]
    parser: Callable[[TextStream], Parser]  # once for each completion
    grammar: Grammar | None = None
    ignored: tuple[str, ...] = ()


def read_tools(listed: Sequence[Tool | Mapping[str, Any]]) -> tuple[Tool, ...]:
    """Tools given in OpenAI's form, or as they are. Raises RequestError for what is none."""
    return tuple(
        tool if isinstance(tool, Tool) else _read_tool(tool, f"tools[{number}]")
        for number, tool in enumerate(listed)
    )


def _read_tool(tool: Mapping[str, Any], where: str) -> Tool:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    fields = tool.get(kind) if kind in ("function", "custom") else None
    if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str):
        raise RequestError("a tool is a named function or custom tool, in OpenAI's form", where)
    return Tool(
        fields["name"],
        fields.get("description"),
        fields.get("parameters"),
        strict=bool(fields.get("strict")),
        custom=kind == "custom",
        syntax=_read_syntax(fields.get("format"), where) if kind == "custom" else None,
        param=where,
    )


def _read_syntax(form: Any, where: str) -> Grammar | None:
    """What a custom tool's ``format`` says of its input."""
    if form is None or (isinstance(form, Mapping) and form.get("type") == "text"):
        return None
    given = form.get("grammar") if isinstance(form, Mapping) else None
    if not isinstance(given, Mapping) or given.get("syntax") not in ("lark", "regex"):
        raise RequestError("its format is text, or a grammar in Lark or a regex", where)
    return syntax_of(given["syntax"], given.get("definition"), where)


def syntax_of(kind: str, definition: Any, param: str) -> Grammar:
    """The grammar of a custom tool's input: ``lark`` or ``regex``."""
    return (lark if kind == "lark" else regex)(definition, param)


def read_choice(choice: ToolChoice | str | Mapping[str, Any]) -> ToolChoice:
    """A choice as it is or in OpenAI's form: a mode, or the one tool to be called."""
    if isinstance(choice, ToolChoice):
        return choice
    if choice in ("none", "auto", "required"):
        return ToolChoice(choice)  # type: ignore[arg-type]
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    named = choice.get(kind) if isinstance(choice, Mapping) and kind else None
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        raise RequestError("it is none, auto, required, or names a tool", "tool_choice")
    return ToolChoice("required", (named["name"],))


def openai_form(tool: Tool) -> dict[str, Any]:
    """A tool as chat templates expect it; a custom one as a function of one string."""
    function: dict[str, Any] = {"name": tool.name, "description": describe(tool)}
    function["parameters"] = arguments_schema(tool)
    return {"type": "function", "function": function}


def arguments_schema(tool: Tool) -> Mapping[str, Any]:
    """The schema of the JSON that a call's arguments are."""
    if not tool.custom:
        unsaid = NO_ARGUMENTS if tool.strict else ANY_OBJECT
        return unsaid if tool.parameters is None else tool.parameters
    return {
        "type": "object",
        "properties": {INPUT: {"type": "string"}},
        "required": [INPUT],
        "additionalProperties": False,
    }


def describe(tool: Tool) -> str:
    """What a model is told of a tool, in words."""
    text = tool.description or ""
    if tool.syntax is None:
        return text
    return f"{text}\n\nIts input must match this grammar:\n{_definition(tool.syntax)}".lstrip()


def _definition(syntax: Grammar) -> str:
    """A grammar as the client wrote it."""
    start, wrapper = syntax.start, "%lark {\n"
    if start.startswith(wrapper) and not syntax.rules:
        return start.removeprefix(wrapper).removesuffix("}").rstrip()
    return start if not syntax.rules else syntax.lark()
