"""What a completion must be: a value, which the engine compiles and every sampled token obeys.

A grammar is a text in llguidance's dialect of Lark; the builders here write one for a JSON schema,
a regular expression, a choice, or a grammar of the client's own. What they write has no names, so a
``start`` can be a part of another grammar's. JSON is compact: no space that a model could go on
with for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ruvon.errors import RequestError

Schema: TypeAlias = Mapping[str, Any] | bool

LONGEST = 1 << 19  # characters of a grammar; a schema of that many takes about half a second
LONGEST_GBNF = 1 << 16  # its converter is slow, and in Python
MOST_GBNF_RULES = 1000

COMPACT = {"whitespace_flexible": False}

# OpenAI's limits for strict schemas
MOST_PROPERTIES, MOST_LEVELS, MOST_ENUM_VALUES, MOST_CHARACTERS = 5000, 10, 1000, 120_000

MAPS = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
SINGLES = (
    "items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if",
    "then", "else", "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
LEVELS = {"properties", "patternProperties", "additionalProperties", "items", "prefixItems"}
"""Keywords whose schemas are of values one level further in."""
KEYWORDS = tuple(dict.fromkeys((*MAPS, *LISTS, *SINGLES)))  # ``items`` may be a list or a schema


@dataclass(frozen=True, slots=True)
class Form:
    """A JSON schema as a client gave it, for models that are told of it."""

    schema: Schema
    name: str = "response"
    description: str | None = None


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in llguidance's dialect of Lark.

    ``start`` is the right-hand side of its first rule, so that a grammar can be a part of another;
    ``param`` is the request's field that errors name, ``form`` what it was made of, if that is a
    JSON schema.
    """

    start: str
    rules: str = ""
    param: str = "response_format"
    form: Form | None = field(default=None, compare=False)

    def lark(self) -> str:
        """The whole text."""
        return f"start: {self.start}\n{self.rules}"


def json_schema(
    schema: Schema,
    *,
    strict: bool = False,
    param: str = "response_format",
    name: str | None = None,
    description: str | None = None,
) -> Grammar:
    """JSON that validates; its ``name`` and ``description`` are for the model. With ``strict`` the
    schema keeps OpenAI's rules for such schemas, or RequestError says which it breaks and where.
    What the engine cannot enforce it refuses."""
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"{param}: a JSON schema must be an object.", param)
    if strict:
        check_strict(schema, param)
    compact = schema
    if isinstance(schema, Mapping):
        compact = {**schema, "x-guidance": COMPACT}
    elif schema:
        compact = {"x-guidance": COMPACT}
    form = Form(schema, name or "response", description)
    return _bounded(Grammar(f"%json {_dump(compact, param)}", param=param, form=form))


def json_object(param: str = "response_format") -> Grammar:
    """Any JSON object."""
    return replace(json_schema({"type": "object"}, param=param), form=None)


def regex(pattern: str, param: str = "structured_outputs.regex") -> Grammar:
    """Text that a regular expression of Rust's syntax matches as a whole."""
    from llguidance import regex_to_lark  # takes long to load

    return _bounded(Grammar(f"/{regex_to_lark(_text(pattern, param))}/", param=param))


def choice(options: Sequence[str], param: str = "structured_outputs.choice") -> Grammar:
    """One of several texts."""
    if not options:
        raise RequestError(f"{param} must hold at least one text.", param)
    texts = " | ".join(json.dumps(_text(option, param)) for option in options)
    return _bounded(Grammar(f"%lark {{\nstart: OPTION\nOPTION: {texts}\n}}", param=param))


def lark(text: str, param: str = "structured_outputs.grammar") -> Grammar:
    """A grammar in llguidance's dialect of Lark, whose first rule is ``start``."""
    return _bounded(Grammar(f"%lark {{\n{_text(text, param)}\n}}", param=param))


def gbnf(text: str, param: str = "structured_outputs.grammar") -> Grammar:
    """A grammar in llama.cpp's form, whose first rule is ``root``."""
    from llguidance.gbnf_to_lark import gbnf_to_lark  # takes long to load

    if len(_text(text, param)) > LONGEST_GBNF or text.count("::=") > MOST_GBNF_RULES:
        bound = f"{LONGEST_GBNF} characters and {MOST_GBNF_RULES} rules"
        raise RequestError(f"{param}: a GBNF grammar may have at most {bound}.", param)
    try:
        converted = gbnf_to_lark(re.sub(ESCAPE, _unescape, text))
    except RecursionError:
        raise RequestError(f"{param}: the grammar is nested too deeply.", param) from None
    except Exception as error:  # the converter raises bare ones, and IndexError at the end of text
        raise RequestError(f"{param}: not a GBNF grammar: {str(error)[:200]}", param) from None
    return lark(converted, param)


def grammar(text: str, param: str = "structured_outputs.grammar") -> Grammar:
    """A grammar in either form: GBNF writes rules with ``::=``, Lark with a colon."""
    return gbnf(text, param) if "::=" in _text(text, param) else lark(text, param)


ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def _unescape(escape: re.Match[str]) -> str:
    """A character instead of its code, which Lark writes otherwise; a character that means
    something stays escaped."""
    code = escape[1] or escape[2]
    if code is None or int(code, 16) > 0x10FFFF:
        return escape[0]
    char = chr(int(code, 16))
    return char if char.isprintable() and char not in '"\\[]^-/' else f"\\x{ord(char):02x}"


def _text(text: object, param: str) -> str:
    if not isinstance(text, str):
        raise RequestError(f"{param} must be a text.", param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{param} is not valid Unicode: a lone surrogate.", param) from None
    return text


ENCODER = json.JSONEncoder(allow_nan=False)


def _dump(schema: Schema, param: str) -> str:
    """As JSON, piece by piece: all at once would hold the interpreter's lock, as one long text
    would, and for what is too long there is no need of the rest."""
    _check_size(_least_size(schema), param)
    pieces, size = [], 0
    try:
        for piece in ENCODER.iterencode(schema):
            pieces.append(piece)
            size += len(piece)
            if size > LONGEST:
                break
        return "".join(pieces)
    except RecursionError:
        raise RequestError(f"{param}: the schema is nested too deeply.", param) from None
    except (TypeError, ValueError) as error:
        raise RequestError(f"{param}: the schema is no JSON ({error}).", param) from None


def _least_size(schema: Schema) -> int:
    """How many characters its JSON has at least, counted until they are too many."""
    size, left = 0, [schema]
    while left and size <= LONGEST:
        value: object = left.pop()
        size += len(value) if isinstance(value, str) else 1
        if isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            left += value
    return size


def _bounded(grammar: Grammar) -> Grammar:
    _check_size(len(grammar.start) + len(grammar.rules), grammar.param)
    return grammar


def _check_size(size: int, param: str) -> None:
    if size > LONGEST:
        raise RequestError(
            f"{param}: a grammar or schema may have at most {LONGEST} characters.", param
        )


# ------------------------------------------------------------------------------ schemas, by place


@dataclass(frozen=True, slots=True)
class Place:
    """A schema within a schema."""

    schema: Any
    pointer: str  # RFC 6901
    level: int  # of objects and arrays around its values


def inner(place: Place) -> Iterator[Place]:
    """The schemas that a schema is directly made of."""
    schema = place.schema
    if not isinstance(schema, Mapping):
        return
    for keyword in KEYWORDS:
        held = schema.get(keyword)
        level = place.level + (keyword in LEVELS)
        pointer = f"{place.pointer}/{keyword}"
        if keyword in MAPS and isinstance(held, Mapping):
            for name, each in held.items():
                yield Place(each, f"{pointer}/{escaped(name)}", level)
        elif keyword in LISTS and isinstance(held, list | tuple):
            for i, each in enumerate(held):
                yield Place(each, f"{pointer}/{i}", level)
        elif keyword in SINGLES and isinstance(held, Mapping | bool):
            yield Place(held, pointer, level)


def places(schema: Schema) -> Iterator[Place]:
    """A schema and all within it; an outer one before its inner ones."""
    waiting = [Place(schema, "", 0)]
    while waiting:
        place = waiting.pop()
        yield place
        waiting += reversed([*inner(place)])


def escaped(name: str) -> str:
    """A name as a part of a JSON pointer."""
    return str(name).replace("~", "~0").replace("/", "~1")


# ------------------------------------------------------------------------------ OpenAI's rules


def check_strict(schema: Schema, param: str) -> None:
    """Raises RequestError naming keyword and JSON pointer of what breaks a rule."""
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        raise broken(param, "type", "", "the root of a strict schema must be an object")
    num_properties = num_values = num_characters = 0
    for place in places(schema):
        if not isinstance(place.schema, Mapping):
            continue
        check_object(place, param)
        if place.level > MOST_LEVELS:
            why = f"a strict schema may have at most {MOST_LEVELS} levels"
            raise broken(param, "properties", place.pointer, why)
        names = _map(place.schema.get("properties"))
        values = place.schema.get("enum", ())
        values = values if isinstance(values, list | tuple) else ()
        num_properties += len(names)
        num_values += len(values)
        texts = (*names, *values, *_map(place.schema.get("$defs")), place.schema.get("const"))
        num_characters += sum(len(text) for text in texts if isinstance(text, str))
        for keyword, number, most in (
            ("properties", num_properties, MOST_PROPERTIES),
            ("enum", num_values, MOST_ENUM_VALUES),
            ("properties", num_characters, MOST_CHARACTERS),
        ):
            if number > most:
                what = "characters of names and values" if most == MOST_CHARACTERS else "in all"
                raise broken(
                    param, keyword, place.pointer, f"a strict schema may have at most {most} {what}"
                )


def check_object(place: Place, param: str) -> None:
    """In a strict schema an object has exactly the properties it names, all of them."""
    schema = place.schema
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list | tuple) else [kinds]
    if "object" not in kinds and "properties" not in schema:
        return
    if schema.get("additionalProperties") is not False:
        raise broken(
            param, "additionalProperties", place.pointer, "a strict schema says false for it"
        )
    required = schema.get("required")
    required = {*map(str, required)} if isinstance(required, list | tuple) else set()
    missing = [name for name in _map(schema.get("properties")) if name not in required]
    if missing:
        why = f"a strict schema requires every property, and '{missing[0][:100]}' is missing"
        raise broken(param, "required", place.pointer, why)


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def broken(param: str, keyword: str, pointer: str, why: str) -> RequestError:
    """What a schema is refused with."""
    return RequestError(
        f"Invalid schema for {param}: '{keyword}' at '{pointer}/{escaped(keyword)}': {why}.",
        param,
        "invalid_json_schema",
    )
