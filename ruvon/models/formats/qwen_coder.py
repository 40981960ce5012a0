"""Qwen3-Coder: ``<tool_call>`` around a function in tags, with a tag for each argument.

An argument is written as it is, so its type is known from the tool's schema only. Argument by
argument the call becomes JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ruvon.models.formats.format import Format
from ruvon.models.formats.grammar import CallGrammar, Rules, escape, quote
from ruvon.models.formats.reader import CallReader, NotACallError, loads, whole
from ruvon.models.formats.scanner import Waiting
from ruvon.models.formats.tools import Tool, arguments_schema

START, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
VALUE_START, VALUE_END = ">\n", f"\n{PARAMETER_END}\n"
NAME = re.compile(r"[^<>\s]*")
LITERALS = {"True": "true", "False": "false", "None": "null"}  # Python's, which models write


def read(calls: CallReader) -> Waiting[None]:
    scanner = calls.scanner
    if calls.marker == START:
        yield from scanner.spaces()
        if not (yield from scanner.take(FUNCTION)):
            raise NotACallError
    tool = calls.tool((yield from scanner.span(NAME)))
    if not (yield from scanner.take(">")):
        raise NotACallError
    calls.begin(tool)
    yield from _read_arguments(calls, tool)
    for tag in (FUNCTION_END, END):
        yield from scanner.close(tag)
    scanner.drop()
    calls.end()


def _read_arguments(calls: CallReader, tool: Tool) -> Waiting[None]:
    scanner, properties = calls.scanner, _properties(tool)
    joint = "{"
    while True:
        yield from scanner.spaces()
        if not (yield from scanner.take(PARAMETER)):
            break
        name = yield from scanner.span(NAME)
        yield from scanner.take(">")
        yield from scanner.take("\n")
        scanner.drop()
        whole = yield from scanner.until(PARAMETER_END)
        value = scanner.drop().removesuffix(PARAMETER_END).removesuffix("\n")
        if tool.custom:
            calls.argue(value)
            continue
        calls.argue(f"{joint}{json.dumps(name, ensure_ascii=False)}: ")
        written = to_json(value, properties.get(name))
        calls.argue(written if whole else written.removesuffix('"'))
        if not whole:
            return
        joint = ", "
    if not tool.custom:
        calls.argue("{}" if joint == "{" else "}")


def _properties(tool: Tool) -> Mapping[str, Any]:
    properties = arguments_schema(tool).get("properties")
    return properties if isinstance(properties, Mapping) else {}


def to_json(value: str, schema: Any) -> str:
    """An argument as JSON: of a type that its schema allows, a string if it is of none."""
    text = LITERALS.get(value.strip(), value)
    if not (types := _types(schema) - {"string"}):
        return json.dumps(value, ensure_ascii=False)
    parsed = loads(text)
    fits = TYPES[type(parsed)] & types if parsed is not None else text.strip() == "null"
    return whole(json.dumps(parsed if fits else value, ensure_ascii=False))


TYPES: Mapping[type, set[str]] = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number", "integer"},
    str: set(),
    dict: {"object"},
    list: {"array"},
}


def _types(schema: Any) -> set[str]:
    """The types that a schema names, as far as it says so itself."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    listed = named if isinstance(named, list) else [named]
    types = {name for name in listed if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            types |= set().union(*map(_types, schema[key]))
    return types


def _body(rules: Rules, tools: Sequence[Tool], several: bool) -> str:
    functions = rules.rule(" | ".join([_function(rules, tool) for tool in tools]))
    return f'"\\n" {functions} {quote(FUNCTION_END)} "\\n" {rules.mark(END)}'


def _function(rules: Rules, tool: Tool) -> str:
    """A call with its arguments in the schema's order, those left out that may be."""
    schema = arguments_schema(tool)
    required = schema.get("required")
    parts = [quote(f"{FUNCTION}{tool.name}>\n")]
    for name, property in _properties(tool).items():
        argument = rules.rule(_argument(rules, name, property, schema, tool))
        optional = not isinstance(required, list) or name not in required
        parts.append(f"{argument}?" if optional else argument)
    if tool.parameters is None and not tool.custom:
        name = f"{quote(PARAMETER)} /[^<>\\s]+/ {quote(VALUE_START)}"
        parts.append(f"({name} {_text(rules)})*")
    return " ".join(parts)


def _argument(rules: Rules, name: str, property: Any, schema: Mapping[str, Any], tool: Tool) -> str:
    begin = quote(f"{PARAMETER}{name}{VALUE_START}")
    values = property.get("enum") if isinstance(property, Mapping) else None
    if _types(property) - {"string"}:
        defs = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        value = rules.json({**defs, **property}, tool)
    elif isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        value = f"({' | '.join(map(quote, values))})"
    else:
        return f"{begin} {_text(rules)}"
    return f"{begin} {value} {quote(VALUE_END)}"


def _text(rules: Rules) -> str:
    """Any text and the end of a value."""
    return rules.rule(f"/(?s:.*){escape(VALUE_END)}/", "[lazy]")


QWEN_CODER = Format(
    "qwen_coder",
    starts=(START, FUNCTION),
    marks=(END,),
    read=read,
    grammar=CallGrammar(START, _body, joint="\n", others=(FUNCTION,)),
)
