"""What a client offers a model to call, and how it may."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ruvon.grammars import Grammar


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool. What it is called with is JSON of the schema ``parameters``, or the text of a
    ``custom`` tool, whose grammar may be ``syntax``."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None  # None: any object
    strict: bool = False
    custom: bool = False
    syntax: Grammar | None = None
    param: str = "tools"  # for errors, such as tools[0]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools may or must be called."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: tuple[str, ...] = ()  # only these may be called; empty: all
    parallel: bool = True  # False: at most one call


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How much a model is to think before it answers."""

    budget: int | None = None  # most tokens of reasoning; None: no limit
    enabled: bool | None = None  # where the template has such a switch; None: its default
    effort: str | None = None
