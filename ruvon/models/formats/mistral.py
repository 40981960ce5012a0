"""Mistral: ``[TOOL_CALLS]`` and a list of JSON objects, or, since version 11 of its tokenizer, a
name, ``[ARGS]`` and the arguments for each call."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

from ruvon.models.formats.format import Format, Messages, Tools
from ruvon.models.formats.grammar import CallGrammar, Rules, json_body, quote
from ruvon.models.formats.json_calls import read_json_calls
from ruvon.models.formats.reader import CallReader, NotACallError
from ruvon.models.formats.scanner import Waiting
from ruvon.models.formats.tools import Tool

START, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
NAME = re.compile(r"[\w.-]*", re.ASCII)
VALID_ID = re.compile("[a-zA-Z0-9]{9}")

read_list = read_json_calls()


def read(calls: CallReader) -> Waiting[None]:
    """Either form."""
    scanner = calls.scanner
    if (yield from scanner.spaces()) in ("[", "{"):
        yield from read_list(calls)
        return
    tool = calls.tool((yield from scanner.span(NAME)))
    if (yield from scanner.take(CALL_ID)):
        yield from scanner.span(NAME)
    marked = yield from scanner.take(ARGUMENTS)
    if (yield from scanner.spaces()) != "{" and not marked:
        raise NotACallError
    calls.begin(tool)
    yield from calls.arguments(tool)
    calls.end()


def _named(rules: Rules, tools: Sequence[Tool], several: bool) -> str:
    one = [f"{quote(tool.name)} {rules.mark(ARGUMENTS)} {rules.arguments(tool)}" for tool in tools]
    return rules.rule(" | ".join(one))


def nine_characters(messages: Messages, tools: Tools, system: bool) -> Messages:
    """Its templates refuse ids of calls that are not nine letters and digits."""
    for message in messages:
        for call in message.get("tool_calls") or ():
            if "id" in call:
                call["id"] = short_id(call["id"])
        if "tool_call_id" in message:
            message["tool_call_id"] = short_id(message["tool_call_id"])
    return messages


def short_id(id: object) -> str:
    """The id, if it will do; else always the same other one."""
    text = str(id)
    return text if VALID_ID.fullmatch(text) else hashlib.sha256(text.encode()).hexdigest()[:9]


MISTRAL = Format(
    "mistral",
    starts=(START,),
    marks=(CALL_ID, ARGUMENTS),
    read=read,
    grammar=CallGrammar(START, json_body(listed=r"/ ?\[/")),
    adapt=nine_characters,
)
MISTRAL_NAMED = replace(MISTRAL, name="mistral_named", grammar=CallGrammar(START, _named, ""))
