"""What checks say: this was expected, that came."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

Shape: TypeAlias = Any
"""What a JSON value should look like: a type; None; a tuple of alternatives; ``[shape]``, a list of
such; a dict of shapes, where keys that end in ``?`` may be missing; a function that says whether;
any other value stands for itself."""


class Failed(Exception):
    """What was expected and what came, in one line."""


class Skipped(Exception):
    """Why a check does not apply to this server."""


def expect(condition: object, expected: str, got: object) -> None:
    """Raises Failed unless ``condition`` holds."""
    if not condition:
        raise Failed(f"expected {expected}; got {brief(got)}")


def expect_equal(got: object, wanted: object, what: str) -> None:
    """``what`` names the value."""
    if got != wanted:
        raise Failed(f"{what}: expected {brief(wanted)}; got {brief(got)}")


def expect_shape(value: object, shape: Shape, at: str = "") -> None:
    """Raises Failed with the path of the first value that does not fit."""
    if wrong := misfit(value, shape, at):
        raise Failed(wrong)


def misfit(value: Any, shape: Shape, at: str = "") -> str | None:
    """What does not fit, and where; None if all does."""
    if isinstance(shape, tuple):
        found = [misfit(value, each, at) for each in shape]
        return None if None in found else _wrong(value, shape, at)
    if isinstance(shape, Mapping):
        return _misfit_of_fields(value, shape, at)
    if isinstance(shape, list):
        return _misfit_of_items(value, shape[0], at)
    return None if _is(value, shape) else _wrong(value, shape, at)


def _misfit_of_fields(value: Any, shape: Mapping[str, Shape], at: str) -> str | None:
    if not isinstance(value, dict):
        return _wrong(value, dict, at)
    for name, inner in shape.items():
        key, where = name.removesuffix("?"), f"{at}.{name}".strip(".?")
        if key not in value:
            if name.endswith("?"):
                continue
            return f"{where} is missing; there are {', '.join(value) or 'no fields'}"
        if wrong := misfit(value[key], inner, where):
            return wrong
    return None


def _misfit_of_items(value: Any, shape: Shape, at: str) -> str | None:
    if not isinstance(value, list):
        return _wrong(value, list, at)
    found = (misfit(item, shape, f"{at}[{index}]") for index, item in enumerate(value))
    return next(filter(None, found), None)


def _is(value: Any, shape: Shape) -> bool:
    if shape is int:
        return type(value) is int
    if shape is float:
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(shape, type):
        return isinstance(value, shape)
    if callable(shape):
        return bool(shape(value))
    return type(value) is type(shape) and bool(value == shape)


def _wrong(value: object, shape: Shape, at: str) -> str:
    return f"{at or 'the answer'}: expected {_name(shape)}; got {brief(value)}"


def _name(shape: Shape) -> str:
    if isinstance(shape, tuple):
        return " or ".join(map(_name, shape))
    if isinstance(shape, type) or callable(shape):
        return str(getattr(shape, "__name__", shape)).replace("_", " ")
    if isinstance(shape, dict | list):
        return type(shape).__name__
    return brief(shape)


def not_empty(value: object) -> bool:
    """A shape: a string with something in it."""
    return isinstance(value, str) and bool(value)


def brief(value: object, most: int = 200) -> str:
    """A value in one line."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    text = repr(text)[1:-1].replace("\\'", "'") if isinstance(value, str) else text
    return text if len(text) <= most else f"{text[:most]}…"
