"""Schemas that answers are asked to have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def closed(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties, as OpenAI's strict mode has it."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def array(items: Any, **keywords: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **keywords}


STRING: Mapping[str, Any] = {"type": "string"}
SHORT = {"type": "string", "maxLength": 12}
INTEGER = {"type": "integer"}
ADDRESS = closed(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 120})
NODE = {"$ref": "#/$defs/node"}

SCHEMAS: tuple[tuple[str, str, Any, bool], ...] = (
    ("boolean", "a boolean", closed(ok={"type": "boolean"}), True),
    ("integer", "an integer", closed(n=INTEGER), True),
    ("number", "a number", closed(x={"type": "number"}), True),
    ("null", "null", closed(nothing={"type": "null"}), True),
    ("enum", "an enum of strings", closed(c={"type": "string", "enum": ["red", "blue"]}), True),
    ("enum-mixed", "an enum of several types", closed(c={"enum": [1, "one", None, True]}), False),
    ("const", "a constant", closed(kind={"const": "sea"}, ok={"type": "boolean"}), False),
    ("nested", "objects in objects", closed(a=closed(b=closed(c={"type": "boolean"}))), True),
    ("array-of-integers", "a short array", closed(a=array(INTEGER, maxItems=3)), True),
    ("array-bounds", "an array of 2 to 4", closed(a=array(SHORT, minItems=2, maxItems=4)), True),
    ("array-of-objects", "objects in an array", closed(a=array(ADDRESS, maxItems=2)), True),
    ("tuple", "a tuple", closed(
        a={"type": "array", "prefixItems": [INTEGER, {"type": "boolean"}], "items": False,
           "minItems": 2}), False),
    ("bounds", "a number within bounds", closed(
        n={"type": "integer", "minimum": 10, "maximum": 20}), True),
    ("exclusive-bounds", "exclusive bounds", closed(
        x={"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3}), True),
    ("lengths", "a string of 3 to 5 characters", closed(
        s={"type": "string", "minLength": 3, "maxLength": 5}), False),
    ("pattern", "a pattern", closed(s={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}), True),
    ("format-date", "a date", closed(d={"type": "string", "format": "date"}), True),
    ("format-date-time", "a date with its time", closed(
        d={"type": "string", "format": "date-time"}), True),
    ("format-email", "an address", closed(e={"type": "string", "format": "email"}), True),
    ("format-uuid", "a UUID", closed(u={"type": "string", "format": "uuid"}), True),
    ("nullable", "a string or null", closed(s={"type": ["string", "null"], "maxLength": 8}), False),
    ("any-of", "one of two shapes", closed(
        v={"anyOf": [{"type": "integer"}, closed(ok={"type": "boolean"})]}), True),
    ("one-of", "one of two types", closed(
        v={"oneOf": [{"type": "integer"}, {"type": "boolean"}]}), False),
    ("all-of", "two conditions", closed(
        n={"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]}), False),
    ("reference", "a reference", closed(a=NODE, b=NODE) | {
        "$defs": {"node": closed(ok={"type": "boolean"})}}, True),
    ("recursive", "a tree", closed(root=NODE) | {"$defs": {"node": closed(
        value={"type": "boolean"}, next={"anyOf": [NODE, {"type": "null"}]})}}, True),
    ("unicode-keys", "keys in many scripts", closed(**{
        "größe": INTEGER, "名前": SHORT, "😀": {"type": "boolean"}}), True),
    ("quoted-keys", "keys with quotes and slashes", closed(**{
        'a"b': {"type": "boolean"}, "c\\d": {"type": "boolean"}, "e/f": {"type": "null"}}), True),
    ("many-properties", "sixteen properties", closed(**{
        f"field_{k}": {"type": "boolean"} for k in range(16)}), True),
    ("additional", "a map of booleans", {
        "type": "object", "additionalProperties": {"type": "boolean"}}, False),
    ("optional", "properties that may be missing", {
        "type": "object", "properties": {"a": {"type": "boolean"}, "b": INTEGER},
        "additionalProperties": False}, False),
)  # fmt: skip
"""Name, title, schema, and whether strict mode allows it."""
