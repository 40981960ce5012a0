"""Why a grammar is refused, in words for whoever sent it: the keyword and the JSON pointer."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any, TypeAlias

from ruvon.errors import RequestError, UnavailableError
from ruvon.grammars import Grammar, Place, broken, inner

ErrorOf: TypeAlias = Callable[[str], str]

MOST_TRIALS = 200  # to find which schema an error comes from, and then where in it
SEARCH_SECONDS = 5.0  # in all: each takes a millisecond, but for one that wants to do harm

JSON = re.compile(r"%json\s*(?=[{\[])")
POSITION = re.compile(r"^(?:at )?(\d+)\((\d+)\): ")
KEYWORDS: tuple[tuple[str, str, str], ...] = (
    (r'Unimplemented keys: \["([^"]+)"', "", "it is not supported"),
    (r"Unknown format", "format", ""),
    (r"not present in a registry", "$ref", "only references within the schema are followed"),
    (r"Pointer '", "$ref", ""),
    (r"Invalid type|incompatible types", "type", ""),
    (r"anyOf is empty", "enum", "no value is left"),
    (r"patternProperty|patternProperties", "patternProperties", ""),
    (r"required property", "required", ""),
    (r"min/maxProperties", "minProperties", ""),
    (r"oneOf", "oneOf", "its alternatives must be told apart by a constant or their types"),
    (r"regex|Regex", "pattern", ""),
)
"""What the library says, the keyword that it means, and better words for some."""


def refusal(grammar: Grammar, error: str, error_of: ErrorOf) -> RequestError:
    """The error for a grammar that does not compile; ``error_of`` tells why another does not. What
    of it is at fault is not looked for longer than `SEARCH_SECONDS`."""
    reason, deadline = reason_of(error), time.monotonic() + SEARCH_SECONDS

    def in_time(text: str) -> str:
        if time.monotonic() > deadline:
            raise TimeoutError
        return error_of(text)

    with suppress(TimeoutError, UnavailableError):
        for schema in islice(schemas_of(grammar.lark()), MOST_TRIALS):
            if reason_of(in_time(lark_of(schema))) == reason:
                return invalid_schema(grammar.param, locate(schema, reason, in_time), reason)
    return unlocated(grammar, reason)


def unlocated(grammar: Grammar, reason: str) -> RequestError:
    """The error for a grammar of which no part is known to be at fault."""
    return RequestError(f"Invalid grammar for {grammar.param}: {reason}.", grammar.param)


def reason_of(error: str) -> str:
    """The library's message in one line, without what it shows of the grammar."""
    while at := POSITION.match(error):
        error = error[at.end() :]
    lines = error.removeprefix("failed to compile JSON schema: ").splitlines() or [""]
    named = [line for line in lines if line.startswith("error: ")]
    if "regex" in lines[0] and named:
        return f"regex: {named[0].removeprefix('error: ')}"
    if lines[0].startswith("NoExtension"):
        return "nothing satisfies it"
    return lines[0][:200].rstrip(".")


def schemas_of(lark: str) -> Iterator[Any]:
    """The JSON schemas that are written in a grammar."""
    decoder = json.JSONDecoder()
    for found in JSON.finditer(lark):
        try:
            yield decoder.raw_decode(lark, found.end())[0]
        except (ValueError, RecursionError):  # mere text that looks like one
            continue


def lark_of(schema: Any) -> str:
    return f"start: %json {json.dumps(schema)}\n"


def locate(schema: Mapping[str, Any], reason: str, error_of: ErrorOf) -> Place:
    """The innermost schema that fails by itself for the same reason."""
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    place, num_trials, found = Place(schema, "", 0), 0, True
    while found:
        found = False
        for each in inner(place):
            num_trials += 1
            if num_trials > MOST_TRIALS or not isinstance(each.schema, Mapping):
                continue
            alone = {**shared, **each.schema, "x-guidance": schema.get("x-guidance", {})}
            if reason_of(error_of(lark_of(alone))) == reason:
                place, found = each, True
                break
    return place


def invalid_schema(param: str, place: Place, reason: str) -> RequestError:
    """The error with keyword and pointer, as far as they are known."""
    schema = place.schema if isinstance(place.schema, Mapping) else {}
    for pattern, keyword, why in KEYWORDS:
        if said := re.search(pattern, reason):
            keyword = keyword or said[1]
            if keyword in schema:
                return broken(param, keyword, place.pointer, why or reason)
    for keyword in schema:
        if re.search(rf"\b{re.escape(keyword)}\b", reason):
            return broken(param, keyword, place.pointer, reason)
    message = f"Invalid schema for {param}: at '{place.pointer}': {reason}."
    return RequestError(message, param, "invalid_json_schema")
