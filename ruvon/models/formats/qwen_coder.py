"""Qwen3-Coder: ``<tool_call>`` around a function in tags, with a tag for each argument.

An argument is written as it is, so its type is known from the tool's schema only. Argument by
argument the call becomes JSON. So a text's length and pattern can be enforced, its ``format``
cannot: a strict tool with one is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ruvon.grammars import broken, check_strict, escaped, regex
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
MOST_REFERENCES = 16  # from one to the next, before a circle is supposed
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
    """The arguments' schemas; one that refers to another is that other."""
    schema = arguments_schema(tool)
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    return {name: _referred(property, schema) for name, property in properties.items()}


def _referred(property: Any, root: Mapping[str, Any]) -> Any:
    """The schema of a property, with what it refers to in place of a ``$ref``."""
    for _ in range(MOST_REFERENCES):
        if not isinstance(property, Mapping) or not isinstance(property.get("$ref"), str):
            break
        _, *path = property["$ref"].split("/")
        others = {key: value for key, value in property.items() if key != "$ref"}
        found: Any = root
        for name in path:
            name = name.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        property = {**found, **others} if isinstance(found, Mapping) else others
    return property


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
NAMES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object",
         list: "array", type(None): "null"}  # fmt: skip


def _types(schema: Any) -> set[str]:
    """The types that a schema names, as far as it says so itself."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    listed = named if isinstance(named, list) else [named]
    types = {name for name in listed if isinstance(name, str)}
    if not types:
        types = {NAMES[type(value)] for value in _values(schema) if type(value) in NAMES}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            types |= set().union(*map(_types, schema[key]))
    return types


def _values(schema: Any) -> Sequence[Any]:
    """The values that a schema lists."""
    if not isinstance(schema, Mapping):
        return ()
    if "const" in schema:
        return [schema["const"]]
    listed = schema.get("enum")
    return listed if isinstance(listed, list) else ()


def _body(rules: Rules, tools: Sequence[Tool], several: bool) -> str:
    functions = rules.rule(" | ".join([_function(rules, tool) for tool in tools]))
    return f'"\\n" {functions} {quote(FUNCTION_END)} "\\n" {rules.mark(END)}'


def _function(rules: Rules, tool: Tool) -> str:
    """A call with its arguments in the schema's order, those left out that may be."""
    schema = arguments_schema(tool)
    if tool.strict and not tool.custom:
        check_strict(schema, tool.param)
    required = schema.get("required")
    parts = [quote(f"{FUNCTION}{tool.name}>\n")]
    for name, property in _properties(tool).items():
        argument = rules.rule(_argument(rules, name, property, tool))
        optional = not isinstance(required, list) or name not in required
        parts.append(f"{argument}?" if optional else argument)
    if tool.parameters is None and not tool.custom:
        name = f"{quote(PARAMETER)} /[^<>\\s]+/ {quote(VALUE_START)}"
        parts.append(f"({name} {_text(rules, {})})*")
    return " ".join(parts)


def _argument(rules: Rules, name: str, property: Any, tool: Tool) -> str:
    begin = quote(f"{PARAMETER}{name}{VALUE_START}")
    if values := _values(property):
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        return f"{begin} ({' | '.join(map(quote, texts))}) {quote(VALUE_END)}"
    types = _types(property)
    if not types or "string" in types:
        _check_text(property, name, tool)
        return f"{begin} {_text(rules, property)}"
    schema = arguments_schema(tool)
    defs = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return f"{begin} {rules.json({**defs, **property}, tool)} {quote(VALUE_END)}"


def _check_text(schema: Any, name: str, tool: Tool) -> None:
    if tool.strict and isinstance(schema, Mapping) and "format" in schema:
        why = "this model writes texts as they are, where formats cannot be enforced"
        raise broken(tool.param, "format", f"/properties/{escaped(name)}", why)


def _text(rules: Rules, schema: Any) -> str:
    """A text of a schema, and the end of a value. What may be no text as well is any text."""
    end = escape(VALUE_END)
    bounds = schema if isinstance(schema, Mapping) and schema.get("type") == "string" else {}
    least, most = bounds.get("minLength", 0), bounds.get("maxLength", "")
    pattern = bounds.get("pattern")
    if not isinstance(pattern, str) and (least, most) == (0, ""):
        return rules.rule(f"/(?s:.*){end}/", "[lazy]")
    parts = [f"/(?s:.{{{least},{most}}}){end}/", f"~/(?s:.*){end}(?s:.+)/"]
    if isinstance(pattern, str):
        before, after = ("" if pattern.startswith("^") else "(?s:.*)"), "(?s:.*)"
        if pattern.endswith("$") and not pattern.endswith("\\$"):
            pattern, after = pattern[:-1], ""
        matched = regex(pattern.removeprefix("^"), "").start[1:-1]  # without its slashes
        parts.append(f"/{before}(?:{matched}){after}{end}/")
    return rules.rule(rules.terminal(" & ".join(parts)), "[lazy]")


QWEN_CODER = Format(
    "qwen_coder",
    starts=(START, FUNCTION),
    marks=(END,),
    read=read,
    grammar=CallGrammar(START, _body, joint="\n", others=(FUNCTION,)),
)
