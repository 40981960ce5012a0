"""JSON schemas by the hundred, each of a family of what people write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, TypeAlias

Schema: TypeAlias = dict[str, Any]

KEYS = (
    "name", "id", "kind", "count", "price", "tags", "名前", "clé", "adresse e-mail", "a/b", "x~y",
    "größe", "😀", "$total", "is_active", "quote\"d", "Ünïcode", "создано",
)  # fmt: skip
WORDS = ("red", "green", "blue", "東京", "São Paulo", "n/a", "back\\slash", "two\nlines", "ok")
PATTERNS = (
    "^[a-z]{3,8}$", "^[A-Z]{2}-[0-9]{4}$", "^(yes|no|maybe)$", "^#[0-9a-f]{6}$", "^\\d{1,3}%$",
    "^[A-Za-z_][A-Za-z0-9_]{0,9}$", "^(\\+1 )?[0-9]{3}-[0-9]{4}$", "^v\\d+\\.\\d+\\.\\d+$",
)  # fmt: skip
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "duration", "hostname")


def text(rng: Random) -> Schema:
    return {"type": "string", "maxLength": rng.randint(1, 16)}


def number(rng: Random) -> Schema:
    low = rng.randint(-1000, 1000)
    high = low + rng.randint(0, 2000)
    return rng.choice(
        (
            {"type": "integer", "minimum": low, "maximum": high},
            {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high + 2},
            {"type": "number", "minimum": low / 8, "maximum": high / 8 + 1},
            {"type": "integer", "minimum": 0, "maximum": 500, "multipleOf": rng.randint(2, 9)},
        )
    )


def choice(rng: Random) -> Schema:
    values = [*rng.sample(WORDS, 3), rng.randint(-9, 9), None, rng.random() < 0.5]
    return rng.choice(({"enum": values}, {"const": rng.choice(values)}))


def pattern(rng: Random) -> Schema:
    return {"type": "string", "pattern": rng.choice(PATTERNS)}


def formatted(rng: Random) -> Schema:
    return {"type": "string", "format": rng.choice(FORMATS)}


def simple(rng: Random) -> Schema:
    kinds = (text, number, choice, pattern, formatted, lambda rng: {"type": "boolean"},
             lambda rng: {"type": ["integer", "null"], "minimum": 0, "maximum": 99})  # fmt: skip
    return rng.choice(kinds)(rng)


def array(rng: Random, depth: int = 2) -> Schema:
    fewest = rng.randint(0, 3)
    if rng.random() < 0.3:
        items = [simple(rng) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    most = fewest + rng.randint(0, 2)
    return {"type": "array", "items": value(rng, depth - 1), "minItems": fewest, "maxItems": most}


def record(rng: Random, depth: int = 2) -> Schema:
    keys = rng.sample(KEYS, rng.randint(1, 4))
    schema: Schema = {
        "type": "object",
        "properties": {key: value(rng, depth - 1) for key in keys},
        "required": [key for key in keys if rng.random() < 0.7],
        "additionalProperties": False,
    }
    if rng.random() < 0.2:
        schema["title"], schema["description"] = "A thing", "Nobody needs to read this."
    return schema


def value(rng: Random, depth: int) -> Schema:
    if depth <= 0 or rng.random() < 0.5:
        return simple(rng)
    return rng.choice((array, record))(rng, depth)


def nested(rng: Random) -> Schema:
    schema = simple(rng)
    for _ in range(rng.randint(3, 8)):
        if rng.random() < 0.5:
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 2}
        else:
            key = rng.choice(KEYS)
            schema = {"type": "object", "properties": {key: schema}, "required": [key],
                      "additionalProperties": False}  # fmt: skip
    return schema


def any_of(rng: Random) -> Schema:
    return {"anyOf": [value(rng, 1) for _ in range(rng.randint(2, 4))]}


def one_of(rng: Random) -> Schema:
    """Told apart by a constant, as libraries write unions, or by type."""
    if rng.random() < 0.3:
        return {"oneOf": [number(rng) | {"minimum": 0}, text(rng), {"type": "null"}]}
    cases = []
    for kind in rng.sample(("cat", "dog", "bird", "fish"), 3):
        case = record(rng, 1)
        case["properties"] = {"type": {"const": kind}, **case["properties"]}
        case["required"] = ["type", *case["required"]]
        cases.append(case)
    return {"oneOf": cases}


def all_of(rng: Random) -> Schema:
    return {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": rng.randint(2, 12)}]}


def referring(rng: Random) -> Schema:
    schema = record(rng, 1)
    schema["properties"]["one"] = {"$ref": "#/$defs/thing"}
    schema["properties"]["many"] = {
        "type": "array", "items": {"$ref": "#/$defs/thing"}, "maxItems": 2,
    }  # fmt: skip
    schema["$defs"] = {"thing": record(rng, 1)}
    return schema


def recursive(rng: Random) -> Schema:
    """A tree, or a list of linked things."""
    key = rng.choice(KEYS)
    node = {"type": "object", "properties": {key: simple(rng)}, "required": [key],
            "additionalProperties": False}  # fmt: skip
    if rng.random() < 0.5:
        node["properties"]["children"] = {
            "type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2,
        }  # fmt: skip
    else:
        node["properties"]["next"] = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
    return {"$defs": {"node": node}, "$ref": "#/$defs/node"}


def mapping(rng: Random) -> Schema:
    """An object whose keys are not known."""
    if rng.random() < 0.5:
        return {"type": "object", "patternProperties": {"^[a-z]{1,5}$": simple(rng)},
                "additionalProperties": False}  # fmt: skip
    return {"type": "object", "additionalProperties": simple(rng)}


FAMILIES: tuple[Callable[[Random], Schema], ...] = (
    text, number, choice, pattern, formatted, array, record, nested, any_of, one_of, all_of,
    referring, recursive, mapping,
)  # fmt: skip


def schemas(count: int, seed: int = 0) -> Iterator[tuple[str, Schema]]:
    """So many (family, schema), the same for a seed."""
    rng = Random(seed)
    for i in range(count):
        family = FAMILIES[i % len(FAMILIES)]
        yield family.__name__, family(rng)
