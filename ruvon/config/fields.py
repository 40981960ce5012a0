"""What a setting is: a dataclass field with its help, its kind and its bounds; and their checks."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ruvon.config.sizes import parse_size
from ruvon.errors import ConfigError


def setting(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that carries its help text and what else its checks need: ``least`` and
    ``most`` bound a number, ``unit="size"`` marks a string that `parse_size` must accept, ``form``
    is a pattern with its description that each of several texts must fit, ``secret=True`` keeps
    a value out of messages and of the config's own repr."""
    secret = extra.get("secret", False)
    return field(default=default, repr=not secret, metadata={"help": help, **extra})


NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True, slots=True)
class Kind:
    """A setting's type, taken apart: what a string from the environment must become."""

    base: type
    optional: bool
    choices: tuple[str, ...]
    many: bool = False  # a tuple of texts, comma-separated where it is one text

    def __str__(self) -> str:
        if self.many:
            return "texts"
        return " | ".join(self.choices) if self.choices else NAMES[self.base]


def kinds(cls: type) -> dict[str, Kind]:
    """The kind of every setting of a config class."""
    return {name: _kind(hint) for name, hint in get_type_hints(cls).items()}


def _kind(hint: Any) -> Kind:
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (arg for arg in get_args(hint) if arg is not type(None))
        return dataclasses.replace(_kind(inner), optional=True)
    if get_origin(hint) is Literal:
        return Kind(str, False, get_args(hint))
    if get_origin(hint) is tuple:
        return Kind(str, False, (), many=True)
    return Kind(hint, False, ())


def check_fields(config: Any) -> None:
    """Hold every field of a config against its type, its choices and its bounds.

    Raises:
        ConfigError: naming the first field that fails, and what it may be.
    """
    all_kinds = kinds(type(config))
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if value is None and all_kinds[spec.name].optional:
            continue
        if all_kinds[spec.name].many:
            _formed(value, spec.metadata, spec.name)
            continue
        typed(value, all_kinds[spec.name], spec.name)
        _bounded(value, spec.metadata, spec.name)


def _formed(value: Any, rules: Mapping[str, Any], name: str) -> None:
    """Several texts, each of the setting's form."""
    pattern, words = rules["form"]
    texts = value if isinstance(value, tuple) else (value,)
    for text in texts:
        if not (isinstance(text, str) and re.fullmatch(pattern, text)):
            shown = "" if rules.get("secret") else f", got {text!r}"
            raise ConfigError(f"{name} must be {words}{shown}")
    if texts is not value:
        raise ConfigError(f"{name} must be a tuple of texts")


def _bounded(value: Any, limits: Mapping[str, Any], name: str) -> None:
    least, most = limits.get("least"), limits.get("most")
    if least is not None and not value >= least:  # as NaN is not, either
        raise ConfigError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ConfigError(f"{name} must be at most {most}, got {value}")
    if limits.get("unit") == "size":
        try:
            parse_size(value)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error


def typed(value: Any, kind: Kind, source: str) -> Any:
    """A value that has a type already; an integer will do where a number is wanted."""
    number = kind.base is float and isinstance(value, int)
    fits = isinstance(value, kind.base) or number
    if not fits or (isinstance(value, bool) and kind.base is not bool):
        raise ConfigError(f"{source} must be {kind}, got {value!r}")
    if kind.choices and value not in kind.choices:
        raise ConfigError(f"{source} must be one of {kind}, got {value!r}")
    return value
