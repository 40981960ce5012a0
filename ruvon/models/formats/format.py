"""A format: how a family of models writes calls, as data and three functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ruvon.models.formats.grammar import CallGrammar
from ruvon.models.formats.reader import ReadCalls

Messages: TypeAlias = list[dict[str, Any]]
Tools: TypeAlias = Sequence[Mapping[str, Any]] | None


def as_they_are(messages: Messages, tools: Tools, system: bool) -> Messages:
    return messages


@dataclass(frozen=True, slots=True)
class Format:
    """How a family of models is talked to.

    ``starts`` begin a call and ``marks`` are other markers within; ``read`` reads what follows a
    start; ``grammar`` says the same for a grammar. ``adapt`` makes of messages (as `prepare` makes
    them) and tools the messages that the template takes; it is told whether a system message is
    one of them.
    """

    name: str
    starts: tuple[str, ...]
    marks: tuple[str, ...]
    read: ReadCalls
    grammar: CallGrammar
    adapt: Callable[[Messages, Tools, bool], Messages] = as_they_are
