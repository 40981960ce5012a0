"""Llama 3: a JSON object of name and parameters, alone or after ``<|python_tag|>``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ruvon.models.formats.format import Format, Messages, Tools
from ruvon.models.formats.grammar import CallGrammar, json_body
from ruvon.models.formats.json_calls import read_json_calls

START = "<|python_tag|>"


def one_at_a_time(messages: Messages, tools: Tools, system: bool) -> Messages:
    """Its templates take one call a message: several become as many messages, each with its
    result behind it."""
    told: Messages = []
    begin = 0
    while begin < len(messages):
        end = begin + 1
        while end < len(messages) and messages[end].get("role") == "tool":
            end += 1
        told += _one_by_one(messages[begin], messages[begin + 1 : end])
        begin = end
    return told


def _one_by_one(message: Mapping[str, Any], results: Messages) -> Iterator[dict[str, Any]]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or len(calls) < 2:
        yield dict(message)
        yield from results
        return
    by_id: dict[Any, Messages] = {}
    for result in results:
        by_id.setdefault(str(result.get("tool_call_id")), []).append(result)
    content = message["content"]
    for call in calls:
        yield {**message, "content": content, "tool_calls": [call]}
        content = ""
        yield from by_id.pop(str(call.get("id")) if isinstance(call, dict) else "", [])
    for others in by_id.values():
        yield from others


LLAMA = Format(
    "llama",
    starts=(START,),
    marks=(),
    read=read_json_calls(joints=";,"),
    grammar=CallGrammar(START, json_body(arguments="parameters"), bare=True),
    adapt=one_at_a_time,
)
