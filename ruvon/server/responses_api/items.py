"""Items → the messages of a chat, and → what is stored of them.

A model's turn is one assistant message in a chat, but several items here: reasoning, a message,
calls. Items that follow each other go into one message as far as one can hold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ruvon.errors import RequestError
from ruvon.server.responses_api.input import (
    READ,
    AnyItem,
    CallOutputItem,
    CompactionItem,
    CustomToolCallItem,
    FunctionCallItem,
    MessageItem,
    OtherItem,
    Part,
    ReasoningItem,
    ReferenceItem,
)
from ruvon.server.responses_api.output import new_id
from ruvon.server.responses_api.tools import flat_name
from ruvon.server.schemas.base import missing
from ruvon.server.sealed import unseal

SUMMARY = "Summary of the conversation so far:\n"


class Transcript:
    """The messages of a conversation, made of one item after the other."""

    def __init__(self, instructions: str | None) -> None:
        self.messages: list[dict[str, Any]] = []
        self.skipped: list[str] = []  # items that mean nothing here, such as input[3].mcp_call
        self._names: dict[str, str] = {}  # of calls, by their id
        if instructions is not None:
            self._put("system", instructions)

    def add(self, item: AnyItem, where: str) -> None:
        """``where`` is the item's place in the request. Raises RequestError for what cannot be
        read: an image, a file, another server's secret."""
        match item:
            case MessageItem(role="assistant"):
                self._say(text_of(item.content, f"{where}.content"))
            case MessageItem():
                self._put(item.role, text_of(item.content, f"{where}.content"))
            case FunctionCallItem():
                called = {"name": self._name(item), "arguments": item.arguments}
                self._call({"id": item.call_id, "type": "function", "function": called})
            case CustomToolCallItem():
                called = {"name": self._name(item), "input": item.input}
                self._call({"id": item.call_id, "type": "custom", "custom": called})
            case CallOutputItem():
                self._answer(item, where)
            case ReasoningItem():
                self._think(item, where)
            case CompactionItem():
                self._put("system", SUMMARY + _unsealed(item, where))
            case OtherItem(type="compaction_trigger"):
                raise RequestError(
                    "Compaction is asked for with POST /v1/responses/compact.",
                    where,
                    "unsupported_value",
                )
            case OtherItem():
                self.skipped.append(f"{where}.{item.type}"[:100])
            case ReferenceItem():
                raise AssertionError("references are resolved before")

    def _put(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def _turn(self) -> dict[str, Any]:
        """The assistant's message that what follows may belong to."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self._put("assistant", "")
        return self.messages[-1]

    def _say(self, text: str) -> None:
        if self._turn()["content"]:
            self._put("assistant", "")
        self.messages[-1]["content"] = text

    def _think(self, item: ReasoningItem, where: str) -> None:
        text = reasoning_of(item, where)
        if text is None:
            self.skipped.append(f"{where}.encrypted_content")
            return
        turn = self._turn()
        if turn["content"] or "tool_calls" in turn:
            self._put("assistant", "")
            turn = self.messages[-1]
        before = turn.get("reasoning_content")
        turn["reasoning_content"] = text if before is None else f"{before}\n{text}"

    def _call(self, call: dict[str, Any]) -> None:
        self._turn().setdefault("tool_calls", []).append(call)

    def _name(self, item: FunctionCallItem | CustomToolCallItem) -> str:
        name = self._names[item.call_id] = flat_name(item.namespace, item.name)
        return name

    def _answer(self, item: CallOutputItem, where: str) -> None:
        message = {"role": "tool", "content": text_of(item.output, f"{where}.output")}
        if item.call_id is not None:
            message["tool_call_id"] = item.call_id
        name = self._names.get(item.call_id or "") or item.name
        if name is not None:
            message["name"] = name
        self.messages.append(message)


FIELDS = {"refusal": "refusal", "input_json": "data"}
"""Type of a part → where it says something, if not in ``text``."""


def text_of(parts: Iterable[Part], where: str) -> str:
    """Parts as one text, on lines of their own. Raises RequestError for one that is no text."""
    texts = []
    for number, part in enumerate(parts):
        if part.type not in READ:
            raise RequestError(
                f"This model reads text only, not {part.type[:100]}.", f"{where}[{number}]"
            )
        if part.words is None:
            field = FIELDS.get(part.type, "text")
            raise missing(f"{where}[{number}].{field}")
        texts.append(part.words)
    return "\n".join(texts)


def reasoning_of(item: ReasoningItem, where: str) -> str | None:
    """What was thought; None if another server has encrypted it."""
    for name in ("content", "summary"):
        if parts := getattr(item, name):
            return text_of(parts, f"{where}.{name}")
    return "" if item.encrypted_content is None else unseal(item.encrypted_content)


def _unsealed(item: CompactionItem, where: str) -> str:
    """Without it the conversation is gone: no reason to go on."""
    text = unseal(item.encrypted_content)
    if text is None:
        raise RequestError(
            "This compaction was made by another server and cannot be read here.",
            f"{where}.encrypted_content",
        )
    return text


# ---------------------------------------------------------------------- what is stored


def stored(item: AnyItem) -> dict[str, Any] | None:
    """An item as it is listed and read again: with an id, and every field that its kind has. None
    for one that means nothing here."""
    match item:
        case MessageItem():
            fields: dict[str, Any] = {"role": item.role, "content": _contents(item)}
        case FunctionCallItem():
            fields = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        case CustomToolCallItem():
            fields = {"call_id": item.call_id, "name": item.name, "input": item.input}
        case CallOutputItem():
            fields = {"call_id": item.call_id, "output": _outputs(item.output)}
        case ReasoningItem():
            fields = {
                "summary": _parts(item.summary, "summary_text"),
                "content": _parts(item.content, "reasoning_text"),
                "encrypted_content": item.encrypted_content,
            }
        case CompactionItem():
            fields = {"encrypted_content": item.encrypted_content}
        case OtherItem() | ReferenceItem():
            return None
    kind = "compaction" if isinstance(item, CompactionItem) else item.type or "message"
    namespace = getattr(item, "namespace", None)
    return {
        "id": item.id or new_id(PREFIXES[kind]),
        "type": kind,
        "status": "completed",
        **fields,
        **({} if namespace is None else {"namespace": namespace}),
    }


PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "function_call_output": "fco",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
    "compaction": "cmp",
}


def _contents(item: MessageItem) -> list[dict[str, Any]]:
    if item.role != "assistant":
        return _parts(item.content, "input_text")
    return [
        {"type": "refusal", "refusal": part.refusal}
        if part.type == "refusal"
        else {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}
        for part in item.content
    ]


def _outputs(parts: Sequence[Part]) -> str | list[dict[str, Any]]:
    """What was given as one text stays one."""
    if len(parts) == 1 and parts[0].type == "text":
        return parts[0].text or ""
    return _parts(parts, "input_text")


def _parts(parts: Sequence[Part] | None, kind: str) -> list[dict[str, Any]]:
    return [{"type": kind, "text": part.words} for part in parts or ()]
