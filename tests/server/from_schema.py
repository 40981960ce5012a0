"""Values that fit a JSON schema, and values that nearly do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

LARGEST = 2**53
DEEPEST = 6  # references followed in one another
JUNK: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def values(schema: Mapping[str, Any], shared: Mapping[str, Any], depth: int = 0) -> Any:
    """A strategy for what ``schema`` allows, as far as these tests' own schemas go; ``shared`` are
    the definitions that references name."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return st.deferred(lambda: values(shared[name], shared, depth + 1))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = schema[key] if depth < DEEPEST else schema[key][-1:]
            return st.one_of([values(kind, shared, depth) for kind in kinds])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    return KINDS[schema.get("type", "any")](schema, shared, depth)


def _number(schema: Mapping[str, Any], shared: Any, depth: int) -> Any:
    least, most = schema.get("minimum"), schema.get("maximum")
    return st.floats(
        schema.get("exclusiveMinimum", least),
        schema.get("exclusiveMaximum", most),
        exclude_min="exclusiveMinimum" in schema,
        exclude_max="exclusiveMaximum" in schema,
        allow_nan=False,
        allow_infinity=False,
    )


def _integer(schema: Mapping[str, Any], shared: Any, depth: int) -> Any:
    least = schema.get("exclusiveMinimum", schema.get("minimum", -1) - 1) + 1
    most = schema.get("exclusiveMaximum", schema.get("maximum", LARGEST) + 1) - 1
    return st.integers(least, min(most, least + 300)) | st.integers(least, most)


def _string(schema: Mapping[str, Any], shared: Any, depth: int) -> Any:
    return st.text(
        st.characters(codec="utf-8"),
        min_size=schema.get("minLength", 0),
        max_size=min(schema.get("maxLength", 30), 30),
    )


def _array(schema: Mapping[str, Any], shared: Any, depth: int) -> Any:
    items = values(schema.get("items", {}), shared, depth)
    least = schema.get("minItems", 0)
    return st.lists(items, min_size=least, max_size=least + (4 if depth < DEEPEST else 0))


def _object(schema: Mapping[str, Any], shared: Any, depth: int) -> Any:
    fields = schema.get("properties", {})
    needed = set(schema.get("required", ()))
    if not fields:
        more = schema.get("additionalProperties", {})
        inner = JUNK if isinstance(more, bool) else values(more, shared, depth)
        return st.dictionaries(
            st.text(max_size=5) | st.integers(0, 300).map(str), inner, max_size=4
        )
    return st.fixed_dictionaries(
        {name: values(field, shared, depth) for name, field in fields.items() if name in needed},
        optional={
            name: values(field, shared, depth)
            for name, field in fields.items()
            if name not in needed
        },
    )


KINDS = {
    "number": _number,
    "integer": _integer,
    "string": _string,
    "array": _array,
    "object": _object,
    "boolean": lambda *_: st.booleans(),
    "null": lambda *_: st.none(),
    "any": lambda *_: JUNK,
}


@st.composite
def spoilt(draw: st.DrawFn, whole: SearchStrategy[Any]) -> Any:
    """A value with a few of what lies in it, however deep, left out or replaced by anything."""
    value = draw(whole)
    if not isinstance(value, dict):
        return draw(JUNK)
    for _ in range(draw(st.integers(0, 3))):
        if not (found := containers(value)):
            break
        inside = draw(st.sampled_from(found))
        keys = sorted(inside) if isinstance(inside, dict) else range(len(inside))
        key = draw(st.sampled_from(keys))
        if draw(st.booleans()):
            inside[key] = draw(JUNK)
        else:
            del inside[key]
    return value


def containers(value: Any) -> list[Any]:
    """All objects and lists in ``value`` that hold something, itself first."""
    if not isinstance(value, dict | list) or not value:
        return []
    held = value.values() if isinstance(value, dict) else value
    return [value, *(inside for each in held for inside in containers(each))]
