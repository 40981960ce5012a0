"""An assistant's message in pieces, and put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from ruvon.deltas import Delta, ToolCall
from ruvon.server.responses import ChatDelta, ChatMessage, ChatToolCall
from ruvon.server.schemas import ChatRequest

Place: TypeAlias = Literal["apart", "content", "nowhere"]
"""Of reasoning: in fields of its own, in the content between tags, or nowhere."""

OPEN, CLOSE = "<think>", "</think>"  # around reasoning that is part of the content


def place_of_reasoning(request: ChatRequest) -> Place:
    """Where a request wants to be told of it."""
    if request.include_reasoning is False or request.reasoning_format == "hidden":
        return "nowhere"
    if request.separate_reasoning is False or request.reasoning_format in ("none", "raw"):
        return "content"
    return "apart"


class Speaker:
    """What the deltas of one choice say. ``called`` once there was a tool call."""

    def __init__(self, place: Place) -> None:
        """``place`` is where reasoning goes."""
        self._place = place
        self._thinking = False  # in the content
        self.called = False

    def say(self, delta: Delta) -> list[ChatDelta]:
        """Reasoning goes under both of the names that clients read."""
        said: list[ChatDelta] = []
        if delta.reasoning and self._place == "apart":
            said.append({"reasoning": delta.reasoning, "reasoning_content": delta.reasoning})
        if content := self._content(delta):
            said.append({"content": content})
        if delta.tool_call is not None:
            self.called = True
            said += [{"tool_calls": [piece]} for piece in call_pieces(delta.tool_call)]
        return said

    def _content(self, delta: Delta) -> str:
        content = ""
        if delta.reasoning and self._place == "content":
            content = delta.reasoning if self._thinking else OPEN + delta.reasoning
            self._thinking = True
        if self._thinking and (delta.text or delta.tool_call is not None):
            content += CLOSE
            self._thinking = False
        return content + delta.text


def call_pieces(call: ToolCall) -> list[ChatToolCall]:
    """What a piece of a call adds: who is called, with nothing yet, and what it is called with."""
    pieces: list[ChatToolCall] = []
    if call.id is not None:
        head: ChatToolCall = {"index": call.index, "id": call.id, "type": "function"}
        name = call.name or ""
        if call.custom:
            pieces.append({**head, "type": "custom", "custom": {"name": name, "input": ""}})
        else:
            pieces.append({**head, "function": {"name": name, "arguments": ""}})
    if call.arguments and call.custom:
        pieces.append({"index": call.index, "custom": {"input": call.arguments}})
    elif call.arguments:
        pieces.append({"index": call.index, "function": {"arguments": call.arguments}})
    return pieces


def message(deltas: Sequence[ChatDelta]) -> ChatMessage:
    """A message of its deltas put together. One that only calls has no content."""
    content = "".join([delta.get("content", "") for delta in deltas])
    calls = joined_calls([piece for delta in deltas for piece in delta.get("tool_calls", ())])
    whole: ChatMessage = {
        "role": "assistant",
        "content": None if calls and not content else content,
        "refusal": None,
        "annotations": [],
    }
    if calls:
        whole["tool_calls"] = calls
    reasoning = "".join([delta.get("reasoning", "") for delta in deltas])
    if reasoning:
        whole["reasoning"] = whole["reasoning_content"] = reasoning
    return whole


def joined_calls(pieces: Sequence[ChatToolCall]) -> list[ChatToolCall]:
    """Calls of their pieces put together."""
    calls: dict[int, list[ChatToolCall]] = {}
    for piece in pieces:
        calls.setdefault(piece["index"], []).append(piece)
    return [_joined_call(mine) for mine in calls.values()]


def _joined_call(pieces: Sequence[ChatToolCall]) -> ChatToolCall:
    first = pieces[0]
    if "custom" in first:
        text = "".join([piece["custom"]["input"] for piece in pieces])
        return {
            "id": first["id"], "type": "custom", "custom": {**first["custom"], "input": text},
        }  # fmt: skip
    text = "".join([piece["function"]["arguments"] for piece in pieces])
    return {
        "id": first["id"],
        "type": "function",
        "function": {**first["function"], "arguments": text},
    }
