"""A small JSON Schema validator, for the schemas that checks ask answers to. What it does not know
is an error of the check's, not of the server's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Schema: TypeAlias = Mapping[str, Any] | bool

TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: type(value) in (int, float),
    "integer": lambda value: type(value) is int or (type(value) is float and value.is_integer()),
}

FORMATS = {
    "date": r"\d{4}-[01]\d-[0-3]\d",
    "time": r"[0-2]\d:[0-5]\d:[0-6]\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)",
    "date-time": r"\d{4}-[01]\d-[0-3]\d[tT][0-2]\d:[0-5]\d:[0-6]\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)",
    "email": r"[^@\s]+@[^@\s]+",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": r"\d{1,3}(\.\d{1,3}){3}",
}

BOUNDS: Mapping[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
    "multipleOf": lambda value, step: (value / step).is_integer(),
}
SIZES: Mapping[str, Callable[[Any, Any], bool]] = {
    "minLength": lambda value, bound: len(value) >= bound,
    "maxLength": lambda value, bound: len(value) <= bound,
    "pattern": lambda value, pattern: bool(re.search(pattern, value)),
    "format": lambda value, name: bool(re.fullmatch(FORMATS[name], value)),
}
LENGTHS: Mapping[str, Callable[[Any, int], bool]] = {
    "minItems": lambda value, bound: len(value) >= bound,
    "maxItems": lambda value, bound: len(value) <= bound,
}
BY_TYPE = (("number", BOUNDS), ("string", SIZES), ("array", LENGTHS))

IGNORED = {"$defs", "description", "title"}
KNOWN = {
    "type", "enum", "const", "properties", "required", "additionalProperties", "items",
    "prefixItems", "anyOf", "oneOf", "allOf", "$ref", *IGNORED, *BOUNDS, *SIZES, *LENGTHS,
}  # fmt: skip


def violation(value: Any, schema: Schema, root: Schema | None = None, at: str = "$") -> str | None:
    """What ``value`` breaks, and where; None if it is valid. Raises ValueError for a keyword that
    is not known here."""
    if isinstance(schema, bool):
        return None if schema else f"{at}: nothing is allowed"
    if unknown := set(schema) - KNOWN:
        raise ValueError(f"no check of {', '.join(sorted(unknown))}")
    root = schema if root is None else root
    if "$ref" in schema:
        return violation(value, _resolve(root, schema["$ref"]), root, at)
    return _of_value(value, schema, at) or _of_parts(value, schema, root, at)


def _of_value(value: Any, schema: Mapping[str, Any], at: str) -> str | None:
    """What can be seen without looking into it."""
    types = schema.get("type", list(TYPES))
    names = [types] if isinstance(types, str) else types
    if not any(TYPES[name](value) for name in names):
        return f"{at}: {value!r} is no {' or '.join(names)}"
    if "enum" in schema and not any(_same(value, each) for each in schema["enum"]):
        return f"{at}: {value!r} is not in the enum"
    if "const" in schema and not _same(value, schema["const"]):
        return f"{at}: {value!r} is not the constant"
    for kind, keywords in BY_TYPE:
        if TYPES[kind](value):
            for keyword, holds in keywords.items():
                if keyword in schema and not holds(value, schema[keyword]):
                    return f"{at}: {value!r} breaks {keyword} {schema[keyword]}"
    return None


def _of_parts(value: Any, schema: Mapping[str, Any], root: Schema, at: str) -> str | None:
    found = [violation(value, each, root, at) for each in schema.get("allOf", ())]
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema:
            fitting = [violation(value, each, root, at) for each in schema[keyword]].count(None)
            if fitting == 0 or (keyword == "oneOf" and fitting > 1):
                found.append(f"{at}: {value!r} fits {fitting} of {keyword}")
    if isinstance(value, dict):
        found += _of_fields(value, schema, root, at)
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        rest = [schema.get("items", True)] * (len(value) - len(first))
        pairs = zip(value, [*first, *rest], strict=False)
        found += [violation(v, s, root, f"{at}[{k}]") for k, (v, s) in enumerate(pairs)]
    return next(filter(None, found), None)


def _of_fields(
    value: Mapping[str, Any], schema: Mapping[str, Any], root: Schema, at: str
) -> list[str | None]:
    properties = schema.get("properties", {})
    rest = schema.get("additionalProperties", True)
    found = [f"{at}.{key} is missing" for key in schema.get("required", ()) if key not in value]
    return found + [
        violation(each, properties.get(key, rest), root, f"{at}.{key}")
        for key, each in value.items()
    ]


def _resolve(root: Schema, pointer: str) -> Schema:
    """``#/$defs/name``."""
    found: Any = root
    for part in pointer.removeprefix("#").split("/")[1:]:
        found = found[part.replace("~1", "/").replace("~0", "~")]
    schema: Schema = found
    return schema


def _same(one: object, other: object) -> bool:
    """Equal as JSON: true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
