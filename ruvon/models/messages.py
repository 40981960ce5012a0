"""Messages and other data of a request, as chat templates expect them: plain JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ruvon.errors import RequestError
from ruvon.models.formats.tools import INPUT

Message: TypeAlias = Mapping[str, Any]

MAX_DEPTH = 100  # of JSON within JSON
KEYS = frozenset((
    "messages", "role", "content", "name", "tool_calls", "tool_call_id", "function", "arguments",
    "id", "type", "reasoning", "reasoning_content", "parameters", "description", "tools",
    "documents", "add_generation_prompt", "continue_final_message",
))  # fmt: skip
"""By which templates find things, whatever special tokens the vocabulary has."""


def prepare(message: Message, index: int, knows_developer: bool) -> dict[str, Any]:
    """A message as plain data: text parts joined by newlines, no missing content, arguments of
    tool calls as objects, reasoning under both of its names."""
    where = f"messages[{index}]"
    prepared: dict[str, Any] = plain(message, where)
    prepared["content"] = text_of(prepared.get("content"), f"{where}.content")
    if prepared.get("role") == "developer" and not knows_developer:
        prepared["role"] = "system"
    if not prepared.get("tool_calls"):
        prepared.pop("tool_calls", None)  # templates ask whether it is there
    for call in prepared.get("tool_calls") or ():
        _as_function(call)
        _parse_arguments(call, where)
    reasoning = prepared.get("reasoning_content") or prepared.get("reasoning")
    if reasoning is not None:
        prepared |= {"reasoning_content": reasoning, "reasoning": reasoning}
    return prepared


def text_of(content: Any, where: str) -> str:
    """A message's content as one text, parts on lines of their own. Raises RequestError."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RequestError("content must be a string or a list of parts", param=where)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RequestError(
                f"This model reads text parts only, not {kind}.", param=f"{where}[{i}]"
            )
    return "\n".join(part["text"] for part in content)


def _as_function(call: Any) -> None:
    """A custom tool's call becomes that of a function of one string, which templates know."""
    custom = call.pop("custom", None) if isinstance(call, dict) else None
    if isinstance(custom, dict):
        arguments = {INPUT: custom.get("input", "")}
        call |= {
            "type": "function",
            "function": {"name": custom.get("name"), "arguments": arguments},
        }


def _parse_arguments(call: Any, where: str) -> None:
    """Clients send a call's arguments as JSON text, templates want the object. Text that is not
    a JSON object, such as a model may have written, stays as it is."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return
    if isinstance(arguments, dict):
        function["arguments"] = plain(arguments, f"{where}.tool_calls")


@dataclass(frozen=True, slots=True)
class CallStyle:
    """How a template wants past calls: their arguments as JSON text instead of an object, and a
    message that only calls without content instead of with an empty one."""

    text: bool = False
    no_content: bool = False

    def apply(self, messages: Iterable[dict[str, Any]]) -> None:
        for message in messages:
            calls = message.get("tool_calls")
            if self.no_content and calls and not message.get("content"):
                message["content"] = None
            for call in (calls or ()) if self.text else ():
                _write_arguments(call)


CALL_STYLES = tuple(
    CallStyle(text, no_content) for no_content in (False, True) for text in (False, True)
)
"""The usual one first."""

CALLED = "ruvon_asks"


def a_call() -> list[dict[str, Any]]:
    """Messages with a call of `CALLED`, to try a template with."""
    function = {"name": CALLED, "arguments": {CALLED: 1}}
    call = {"id": "123456789", "type": "function", "function": function}
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]


def _write_arguments(call: Any) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and not isinstance(function.get("arguments"), str):
        arguments = function.get("arguments") or {}
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of exact JSON types only: other objects have methods that a template, sandboxed
    or not, has no business to call. ``where`` is the field that errors name."""
    if depth > MAX_DEPTH:
        raise RequestError(f"nested more than {MAX_DEPTH} deep", param=where)
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)  # an enumeration's own would give its name
        case int():
            return int(value)
        case float():
            return float(value)
        case Mapping():
            return {str(key): plain(item, where, depth + 1) for key, item in value.items()}
        case list() | tuple():
            return [plain(item, where, depth + 1) for item in value]
    raise RequestError(f"{type(value).__name__} is not JSON data", param=where)


def strings(value: Any) -> Iterator[str]:
    """Every string in plain data, keys that a client chose included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in KEYS:
                yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same data with every such string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {
            key if key in KEYS else change(key): map_strings(item, change)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    return value
