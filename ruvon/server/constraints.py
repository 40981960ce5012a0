"""The one thing that a request says its answer must be, as a grammar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

from ruvon.errors import RequestError
from ruvon.grammars import Grammar, choice, gbnf, grammar, json_object, json_schema, regex
from ruvon.server.schemas.base import missing
from ruvon.server.schemas.constraints import ConstraintFields, ResponseFormat


class Wish(NamedTuple):
    """A constraint that was asked for: where, of what kind, and what."""

    param: str
    kind: str  # json, object, regex, choice or grammar
    value: Any
    strict: bool = False
    name: str | None = None  # of a schema
    description: str | None = None


KINDS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "ebnf",
    "grammar": "grammar",
}
"""Fields of a request → what they hold."""


def grammar_of(request: ConstraintFields) -> Grammar | None:
    """What the answer must be. Raises RequestError for what cannot be had, and for two wishes."""
    wishes = list(wished(request))
    if not wishes:
        return None
    if len(wishes) > 1:
        raise two_wishes(wishes[0].param, wishes[1].param)
    return build(wishes[0])


def two_wishes(first: str, second: str) -> RequestError:
    """What is raised where two fields say what the answer must be."""
    return RequestError(
        f"'{first}' and '{second}' both say what the answer must be; give one of them.", second
    )


def wished(request: ConstraintFields) -> Iterator[Wish]:
    """All constraints in a request."""
    if request.response_format is not None:
        yield from of_format(request.response_format)
    if (given := request.structured_outputs) is not None:
        if given.json_object:
            yield Wish("structured_outputs.json_object", "object", None)
        values = {
            "json": given.json_,
            "regex": given.regex,
            "choice": given.choice,
            "grammar": given.grammar,
        }
        for kind, value in values.items():
            if value is not None:
                yield Wish(f"structured_outputs.{kind}", kind, value)
    for name, kind in KINDS.items():
        if (value := getattr(request, name)) is not None:
            yield Wish(name, kind, value)


def of_format(format: ResponseFormat) -> Iterator[Wish]:
    """What a ``response_format`` asks for."""
    match format.type:
        case "text":
            return
        case "json_object" if format.schema_ is None:
            yield Wish("response_format", "object", None)
        case "json_object":
            yield Wish("response_format.schema", "json", format.schema_)
        case "json_schema":
            if (given := format.json_schema) is None:
                raise missing("response_format.json_schema")
            where, strict = "response_format.json_schema.schema", bool(given.strict)
            yield Wish(where, "json", given.schema_, strict, given.name, given.description)
        case kind:
            where = f"response_format.{kind}"
            if (value := getattr(format, kind)) is None:
                raise missing(where)
            yield Wish(where, kind, value)


def build(wish: Wish) -> Grammar:
    """The grammar of a wish."""
    param, value = wish.param, wish.value
    match wish.kind:
        case "object":
            return json_object(param)
        case "json":
            return json_schema(
                schema_of(value, param),
                strict=wish.strict,
                param=param,
                name=wish.name,
                description=wish.description,
            )
        case "regex":
            return regex(value, param)
        case "choice":
            return choice(value, param)
        case "ebnf":
            return gbnf(value, param)
    return grammar(value, param)


def schema_of(value: object, param: str) -> Any:
    """A schema, which may come as text."""
    if not isinstance(value, str):
        return value
    try:
        schema = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"'{param}' is not valid JSON: {error}.", param) from None
    if not isinstance(schema, dict | bool):
        raise RequestError(f"'{param}' must be a JSON schema: an object.", param)
    return schema
