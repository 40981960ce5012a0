"""JSON schemas as the TypeScript types in which gpt-oss is told what its tools take.

Which keywords are shown, and where the comments go, is what the model was trained with: the text is
that of openai-harmony, letter for letter. Keywords that it leaves out are left out here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

NAMES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


def lines_of(text: str) -> list[str]:
    """Lines without their ends; a last one that is empty is none."""
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def type_of(schema: Any, indent: str = "") -> str:
    """The type of a schema; what follows its first line stands behind ``indent``."""
    if not isinstance(schema, Mapping):
        return "any"
    if isinstance(variants := schema.get("oneOf"), list):
        return "".join([_variant(each, f"\n{indent} | ", indent) for each in variants])
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        return " | ".join(names) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return f"{type_of(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string" and (values := _enum(schema)):
        texts = [f'"{value}"' for value in values if isinstance(value, str)]
        return " | ".join(texts) or "string"
    return NAMES.get(kind, "any") if isinstance(kind, str) else "any"


def _object(schema: Mapping[str, Any], indent: str) -> str:
    properties = schema.get("properties")
    parts = [f"{indent}// {text}\n" for text in _texts(schema, "description")]
    parts.append("{\n")
    if isinstance(properties, Mapping):
        required = schema.get("required")
        required = required if isinstance(required, list) else []
        for name, each in properties.items():
            key = f"{name}{'' if name in required else '?'}"
            parts += _property(key, each if isinstance(each, Mapping) else {}, indent)
    return "".join([*parts, indent, "}"])


def _property(key: str, schema: Mapping[str, Any], indent: str) -> Iterator[str]:
    """``key`` has a question mark if it may be missing."""
    yield from [f"{indent}// {text}\n{indent}//\n" for text in _texts(schema, "title")]
    if "oneOf" not in schema:
        yield from [f"{indent}// {text}\n" for text in _texts(schema, "description")]
    examples = schema.get("examples")
    if isinstance(examples, list) and examples:
        yield f"{indent}// Examples:\n"
        yield from [f'{indent}// - "{each}"\n' for each in examples if isinstance(each, str)]
    if isinstance(schema.get("oneOf"), list):
        yield from _one_of(key, schema, indent)
        return
    default = "" if "oneOf" in schema else "".join(f" // {text}" for text in _default(schema))
    yield f"{indent}{key}: {_nullable(schema, f'{indent}    ')},{default}\n"


def _one_of(key: str, schema: Mapping[str, Any], indent: str) -> Iterator[str]:
    """A property of several types, each on a line of its own. A description that the first of them
    has too is said there."""
    variants = schema["oneOf"]
    said = [*_texts(schema, "description")]
    above = [text for text in said if not variants or [text] != [*_texts(variants[0])]]
    yield from [f"{indent}// {text}\n" for text in above]
    yield from [f"{indent}// {text}\n" for text in _default(schema)]
    yield f"{indent}{key}:\n"
    for number, variant in enumerate(variants):
        comments = [text for text in _texts(variant) if text not in said and (number or not above)]
        comments += _default(variant)
        comment = f" // {' '.join(comments)}" if comments else ""
        yield f"{indent} | {_nullable(variant, f'{indent}   ')}{comment}\n"
    yield f"{indent},\n"


def _variant(schema: Any, lead: str, indent: str) -> str:
    """One of several types, where these are no property's."""
    comments = [*_texts(schema)]
    if isinstance(schema, Mapping) and "default" in schema:
        default = schema["default"]
        comments.append(f"default: {_json(default) if _enum(schema) else _quoted(default)}")
    comment = f" // {' '.join(comments)}" if comments else ""
    return f"{lead}{_nullable(schema, f'{indent}   ')}{comment}"


def _nullable(schema: Any, indent: str) -> str:
    written = type_of(schema, indent)
    nullable = isinstance(schema, Mapping) and schema.get("nullable") is True
    return f"{written} | null" if nullable and "null" not in written else written


def _default(schema: Any) -> Iterator[str]:
    """What is said of a default: of an enumeration's without quotes."""
    if isinstance(schema, Mapping) and "default" in schema:
        default = schema["default"]
        bare = isinstance(default, str) and bool(_enum(schema))
        yield f"default: {default if bare else _quoted(default)}"


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else _json(value)


def _texts(schema: Any, name: str = "description") -> Iterator[str]:
    """The text of a keyword, if there is one."""
    if isinstance(schema, Mapping) and isinstance(text := schema.get(name), str):
        yield text


def _enum(schema: Mapping[str, Any]) -> list[Any]:
    values = schema.get("enum")
    return values if isinstance(values, list) else []


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
