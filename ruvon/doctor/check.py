"""A check: one named question to a server, and what may come of it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from ruvon.doctor.probe import Probe

Question: TypeAlias = Callable[[Probe], Awaitable[None]]
"""Returns where all is well. Raises `Failed` or `Skipped`, or whatever a wrong answer brings."""

Asking = TypeVar("Asking", bound=Question)
Outcome: TypeAlias = Literal["pass", "fail", "skip"]


@dataclass(frozen=True, slots=True)
class Check:
    """``id`` is ``group.name``; ``title`` is what a good server does."""

    id: str
    title: str
    ask: Question
    optional: bool = False  # beyond OpenAI's own API: others' extensions, what operators need
    alone: bool = False  # no other check may run meanwhile

    @property
    def group(self) -> str:
        return self.id.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a check; ``detail`` says why it failed or was skipped, in one line."""

    check: Check
    outcome: Outcome
    detail: str
    seconds: float


def optional(question: Asking) -> Asking:
    """Mark a check of something that OpenAI's own API does not have."""
    question.__dict__["optional"] = True
    return question


def alone(question: Asking) -> Asking:
    """Mark a check that must not be disturbed by others."""
    question.__dict__["alone"] = True
    return question


def collect(group: str, module: Mapping[str, Any]) -> list[Check]:
    """The public coroutine functions of a module (its ``globals()``) that take nothing but a probe,
    as checks of ``group``."""
    return [
        Check(
            f"{group}.{name.replace('_', '-')}",
            inspect.cleandoc(value.__doc__ or name).partition("\n")[0],
            value,
            optional="optional" in value.__dict__,
            alone="alone" in value.__dict__,
        )
        for name, value in module.items()
        if inspect.iscoroutinefunction(value)
        and value.__module__ == module["__name__"]
        and not name.startswith("_")
        and len(inspect.signature(value).parameters) == 1
    ]
