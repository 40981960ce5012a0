"""Tools that a client offers, as the model is told of them; and which it must, or may not, call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ruvon.errors import RequestError
from ruvon.grammars import Grammar
from ruvon.models.formats.tools import Tool, ToolChoice, syntax_of
from ruvon.server.responses_api.schemas import (
    AllowedTool,
    AnyTool,
    Choice,
    CustomTool,
    FunctionTool,
    NamespaceTool,
    OtherTool,
    TurnFields,
)
from ruvon.server.tools import distinct

RESOURCES = frozenset(
    {"code_interpreter", "computer", "computer_use", "computer_use_preview", "file_search", "mcp"}
)
"""Tools that others run over what the user names: without them the answer is another. Those that
agents offer whether they are needed or not (web_search, image_generation, shell ...) are optional
beside tools of the client's own, and so is any kind that nobody here knows."""


@dataclass(slots=True)
class Toolbox:
    """The tools of one request."""

    tools: list[Tool] = field(default_factory=list)
    names: dict[str, tuple[str | None, str]] = field(default_factory=dict)
    """A tool's name as the model knows it → its namespace, and its name there."""
    told: list[dict[str, Any]] = field(default_factory=list)  # what the response says of them
    skipped: list[str] = field(default_factory=list)  # such as tools[3].web_search

    def find(self, wanted: AllowedTool) -> str | None:
        """The name that the model knows a tool by."""
        for flat, (namespace, name) in self.names.items():
            if wanted.name in (name, flat) and wanted.namespace in (None, namespace):
                return flat
        return None


def flat_name(namespace: str | None, name: str) -> str:
    """One name for a tool of a namespace: ``("mcp__files", "read")`` → ``mcp__files__read``."""
    return name if namespace is None else f"{namespace.rstrip('_')}__{name}"


def toolbox(request: TurnFields) -> Toolbox:
    """The tools of ``request``. Raises RequestError for one that is not served, unless it is
    optional, and for two of the same name."""
    box = Toolbox()
    for number, tool in enumerate(request.tools or ()):
        where = f"tools[{number}]"
        if isinstance(tool, NamespaceTool):
            for inner_number, inner in enumerate(tool.tools):
                _add(box, inner, f"{where}.tools[{inner_number}]", tool.name)
        else:
            _add(box, tool, where, None)
        if not isinstance(tool, OtherTool):
            box.told.append(told(tool))
    distinct(box.tools)
    if box.skipped and request.tool_choice != "none":
        _check_skipped(request.tools or (), box)
    return box


def _add(box: Toolbox, tool: AnyTool, where: str, namespace: str | None) -> None:
    if isinstance(tool, OtherTool):
        box.skipped.append(f"{where}.{tool.type}"[:100])
        return
    assert not isinstance(tool, NamespaceTool)
    name = flat_name(namespace, tool.name)
    box.names[name] = (namespace, tool.name)
    if isinstance(tool, FunctionTool):
        schema = f"{where}.parameters"
        made = Tool(name, tool.description, tool.parameters, bool(tool.strict), param=schema)
    else:
        syntax = _syntax(tool, f"{where}.format.definition")
        made = Tool(name, tool.description, custom=True, syntax=syntax, param=where)
    box.tools.append(made)


def _syntax(tool: CustomTool, param: str) -> Grammar | None:
    form = tool.format
    if form is None or form.type == "text" or form.definition is None:
        return None
    return syntax_of(form.syntax or "lark", form.definition, param)


def _check_skipped(tools: Sequence[AnyTool], box: Toolbox) -> None:
    """Raise for a tool that is not served and that the answer depends on: one over resources that
    the user names, or all that there are."""
    for where, kind in _others(tools):
        if kind in RESOURCES or not box.tools:
            raise unserved(kind, where)


def _others(tools: Sequence[AnyTool]) -> Iterator[tuple[str, str]]:
    for number, tool in enumerate(tools):
        if isinstance(tool, OtherTool):
            yield f"tools[{number}]", tool.type


def unserved(kind: str, param: str) -> RequestError:
    return RequestError(
        f"The tool '{kind[:100]}' is not served: this server runs no tools of its own. Offer a "
        "function instead.",
        param,
        "unsupported_value",
    )


def told(tool: FunctionTool | CustomTool | NamespaceTool) -> dict[str, Any]:
    """A tool as the response repeats it."""
    given = tool.model_dump(exclude_none=True)
    if isinstance(tool, FunctionTool):
        absent = {"description": None, "parameters": None, "strict": False}
        return absent | given
    return given


def tool_choice(request: TurnFields, box: Toolbox) -> ToolChoice:
    """Which tools may or must be called. Raises RequestError for one that was not offered."""
    asked, parallel = request.tool_choice or "auto", request.parallel_tool_calls is not False
    if isinstance(asked, Choice):
        return _chosen(asked, box, parallel)
    if asked == "required" and not box.tools:
        raise RequestError("tool_choice 'required' needs tools.", "tool_choice")
    return ToolChoice(asked, parallel=parallel)


def _chosen(asked: Choice, box: Toolbox, parallel: bool) -> ToolChoice:
    if asked.type != "allowed_tools":
        return ToolChoice("required", (_name(asked, box, "tool_choice"),), parallel=False)
    names = [
        _name(tool, box, f"tool_choice.tools[{number}]")
        for number, tool in enumerate(asked.tools or ())
        if tool.name is not None or asked.mode == "required"
    ]
    if not names:
        return ToolChoice("none")
    return ToolChoice(asked.mode or "auto", tuple(names), parallel)


def _name(asked: AllowedTool, box: Toolbox, param: str) -> str:
    if asked.name is None:
        raise unserved(asked.type, param)
    found = box.find(asked)
    if found is None:
        raise RequestError(f"There is no tool of the name '{asked.name[:100]}'.", f"{param}.name")
    return found
