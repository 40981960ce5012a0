"""What an answer must be, composed: reasoning, then calls, an answer of a given form, or both.

In llguidance's Lark a marker that is one token of the vocabulary is ``<[id]>``: no text can spell
it. Where the vocabulary has no such token, a marker is text like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ruvon.grammars import Grammar, json_schema
from ruvon.models.formats.tools import Tool, arguments_schema

LONGEST = 1 << 20  # tokens of reasoning that are counted
MOST_CALLS = 8  # in an answer that must be calls: small models would go on for ever


@dataclass(frozen=True, slots=True)
class CallGrammar:
    """How a format's calls are written, for a grammar.

    ``body`` gives, as the right-hand side of a rule, what follows the marker ``start`` if one of
    some tools is called, or several. ``joint`` is the text between one marked call and the next;
    None if a body holds all calls. A ``bare`` format's calls need no marker, and a text is told
    from them by its first character. ``others`` begin a call that is read, but not as it should be
    written.
    """

    start: str
    body: Callable[[Rules, Sequence[Tool], bool], str]
    joint: str | None = None
    bare: bool = False
    others: tuple[str, ...] = ()


class Rules:
    """Rules in the making. Their names begin so that no client's grammar is likely to clash.

    ``tokens`` are the tokens that markers may be, by their text; ``special`` those that no text
    has, such as the end of a turn; all are below ``size``, which a model's head may exceed.
    """

    def __init__(self, tokens: Mapping[str, int], special: Iterable[int], size: int) -> None:
        self._tokens = tokens
        self._special = frozenset(special)
        self._size = size
        self._rules: list[str] = []

    def rule(self, body: str, options: str = "") -> str:
        """Adds a rule; gives its name."""
        name = f"turn-{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def terminal(self, body: str) -> str:
        name = f"TURN-{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def is_token(self, marker: str) -> bool:
        return marker in self._tokens

    def mark(self, marker: str) -> str:
        """A marker, as a part of a rule's body."""
        return f"<[{self._tokens[marker]}]>" if marker in self._tokens else quote(marker)

    def tokens(self, but: str = "", *, of_text: bool = False) -> str:
        """Any token, or any of a text, but one marker."""
        left_out = {self._tokens[but]} if but else set()
        return f"<[{ranges(self._size, left_out | self._special if of_text else left_out)}]>"

    def arguments(self, tool: Tool) -> str:
        """A call's arguments as JSON, as a rule."""
        return self.json(arguments_schema(tool), tool, strict=tool.strict and not tool.custom)

    def json(self, schema: Any, tool: Tool, strict: bool = False) -> str:
        """JSON of a schema that is a part of a tool, as a rule."""
        return self.include(json_schema(schema, strict=strict, param=tool.param))

    def include(self, grammar: Grammar) -> str:
        """A whole grammar as one rule."""
        if grammar.rules:
            self._rules.append(grammar.rules)
        return self.rule(grammar.start)

    def text(self) -> str:
        return "\n".join(self._rules)


def quote(text: str) -> str:
    """Text as a literal; empty text as nothing."""
    return json.dumps(text) if text else ""


def ranges(size: int, left_out: Iterable[int]) -> str:
    """The ids below ``size`` but for some, as llguidance lists them: 0,5-7."""
    bounds = [-1, *sorted(left_out), size]
    runs = [(before + 1, after - 1) for before, after in pairwise(bounds) if after > before + 1]
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def escape(text: str) -> str:
    """Text as a part of a regular expression between slashes."""
    return re.escape(text).replace("/", "\\/").replace("\\\n", "\\n")


def any_text(rules: Rules, *without: str, first: str = "") -> str:
    """A terminal for text in which markers do not occur; ``first`` is a pattern it begins with."""
    other = "|".join(map(escape, without))
    exception = f" & ~/(?s:.*)({other})(?s:.*)/" if without else ""
    return rules.terminal(f"/{first}(?s:.*)/{exception}")


def calls_only(rules: Rules, form: CallGrammar, tools: Sequence[Tool], parallel: bool) -> str:
    """Calls and nothing else, at most `MOST_CALLS`."""
    call = _marked(rules, form, tools, parallel)
    if form.joint is None or not parallel:
        return call
    return f"{call} ({quote(form.joint)} {call}){{0,{MOST_CALLS - 1}}}"


def calls_in_text(rules: Rules, form: CallGrammar, tools: Sequence[Tool], parallel: bool) -> str:
    """Free text with calls in it; once a marker has been written, a call follows."""
    repeat = "*" if parallel and form.joint is not None else "?"
    if form.bare:
        text = any_text(rules, form.start, first="[^{ \\t\\r\\n]")
        return f"{_marked(rules, form, tools, parallel)} | {text}?"
    tail = any_text(rules, form.start, *form.others)
    if rules.is_token(form.start):
        call = _marked(rules, form, tools, parallel)
        return f"{tail} ({call} {tail}){repeat}"
    body = rules.rule(form.body(rules, tools, parallel and form.joint is None))
    lead = rules.rule(f"/(?s:.*){escape(form.start)}/", "[lazy]")
    return f"({lead} {body}){repeat} {tail}"


def _marked(rules: Rules, form: CallGrammar, tools: Sequence[Tool], parallel: bool) -> str:
    body = form.body(rules, tools, parallel and form.joint is None)
    start = rules.mark(form.start)
    return rules.rule(f"({start})? {body}" if form.bare and start else f"{start} {body}")


def reasoned(
    rules: Rules, answer: str | None, tags: tuple[str, str], opened: bool, budget: int | None
) -> str | None:
    """Reasoning of at most ``budget`` tokens, then the answer; None if nothing is limited.

    ``opened``: the prompt has begun the reasoning already; else the model may leave it out.
    """
    start, end = tags
    if not (rules.is_token(start) and rules.is_token(end)):
        budget = None  # only tokens can be told from text where reasoning is cut off
    if answer is None and budget is None:
        return None
    thought = f"{_thought(rules, end, budget)} {_gap(rules, answer)}"
    if opened:
        return thought
    if answer is not None:
        return f"({rules.mark(start)} {thought}) | ({answer})"
    return f"({rules.mark(start)} {thought}) | ({rules.tokens(start)} {rules.tokens()}*)?"


def _gap(rules: Rules, answer: str | None) -> str:
    """What follows the end of reasoning."""
    return f"{rules.tokens()}*" if answer is None else f"/\\n{{0,2}}/ ({answer})"


def _thought(rules: Rules, end: str, budget: int | None) -> str:
    if not rules.is_token(end):
        return rules.rule(f"/(?s:.*){escape(end)}/", "[lazy]")
    mark = rules.mark(end)
    if budget is None:
        return f"{any_text(rules, end)} {mark}"
    if budget == 0:
        return mark
    # Counts exactly, which llguidance's max_tokens does not.
    return f"{rules.tokens(end, of_text=True)}{{0,{min(budget, LONGEST)}}} {mark}"


def json_body(
    begin: str = "",
    end: tuple[str, str] = ("", ""),
    *,
    arguments: str = "arguments",
    listed: str = "",
) -> Callable[[Rules, Sequence[Tool], bool], str]:
    """The body of formats that write calls as JSON objects: ``begin`` before and ``end``, a text
    and a marker, after one, or after a list of them that opens as ``listed`` says."""

    def body(rules: Rules, tools: Sequence[Tool], several: bool) -> str:
        one = rules.rule(" | ".join([_object(rules, tool, arguments) for tool in tools]))
        if listed:
            more = f'(", " {one}){{0,{MOST_CALLS - 1}}}' if several else ""
            one = f'{listed} {one} {more} "]"'
        text, marker = end
        return f"{quote(begin)} {one} {quote(text)} {rules.mark(marker)}"

    return body


def _object(rules: Rules, tool: Tool, arguments: str) -> str:
    begin = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{arguments}": '
    return f"{quote(begin)} {rules.arguments(tool)} {quote('}')}"
