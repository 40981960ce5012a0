"""One answer of a format: its parser and its grammar, of what a client asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ruvon.errors import RequestError
from ruvon.grammars import Grammar
from ruvon.models.formats.format import Format
from ruvon.models.formats.grammar import (
    Rules,
    any_text,
    calls_in_text,
    calls_only,
    quote,
    reasoned,
)
from ruvon.models.formats.plain import PlainParser
from ruvon.models.formats.reader import CallReader, Markers, ReadCalls, TurnParser
from ruvon.models.formats.scanner import Waiting
from ruvon.models.formats.tools import Parser, Tool, ToolChoice
from ruvon.models.text_stream import TextStream


@dataclass(frozen=True, slots=True)
class Thinking:
    """Whether and how the answer begins with reasoning: between ``tags``, which the prompt may
    have ``opened``; at most ``budget`` tokens of it."""

    tags: tuple[str, str]
    opened: bool
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What one answer may be. ``tools`` are those that may be called; ``tokens`` are the tokens
    that markers may be, by their text; ``special`` those that no text has; all
    tokens are below ``vocab_size``."""

    format: Format
    tools: Sequence[Tool]
    choice: ToolChoice
    response: Grammar | None
    thinking: Thinking | None
    tokens: Mapping[str, int]
    special: frozenset[int]
    vocab_size: int

    @property
    def raw(self) -> Tool | None:
        """The custom tool that has to be called, and no other: its input is written as it is."""
        forced = self.choice.mode == "required" and len(self.tools) == 1
        return self.tools[0] if forced and self.tools[0].custom else None

    def parser(self) -> Callable[[TextStream], Parser]:
        if not self.tools and self.thinking is None:
            return PlainParser
        think = None if self.thinking is None else self.thinking.tags
        texts = (*self.format.starts, *self.format.marks, *(think or ()))
        starts, read = self._calls()
        markers = Markers(
            starts=starts if self.tools else (),
            bare=self.format.grammar.bare and bool(self.tools) and not self.raw,
            think=think,
            shown=frozenset(self.tokens[text] for text in texts if text in self.tokens),
        )
        return partial(
            TurnParser,
            markers=markers,
            read=read,
            tools={tool.name: tool for tool in self.tools},
            thinking=self.thinking is not None and self.thinking.opened,
            parallel=self.choice.parallel and not self.raw,
            only=self.choice.mode == "required",
        )

    def _calls(self) -> tuple[tuple[str, ...], ReadCalls]:
        """(what begins calls, how they are read)"""
        if self.raw is None:
            return self.format.starts, self.format.read
        prefix, suffix = self._envelope(self.raw)
        return ("".join(prefix),), read_raw(self.raw, suffix)

    def _envelope(self, tool: Tool) -> tuple[tuple[str, str], str]:
        """((marker, text) before the raw input of a custom tool, the marker after it). Where that
        is no token, the input cannot be told from it and has no end but the answer's."""
        ends = [mark for mark in self.format.marks[:1] if mark in self.tokens]
        return (self.format.grammar.start, f"\n{tool.name}\n"), "".join(ends)

    def grammar(self) -> Grammar | None:
        """None if the model is free."""
        rules = Rules(self.tokens, self.special, self.vocab_size)
        answer = self._answer(rules)
        if self.thinking is not None:
            thinking = self.thinking
            answer = reasoned(rules, answer, thinking.tags, thinking.opened, thinking.budget)
        elif self.response is not None and not self.tools:
            return self.response  # with nothing around it
        if answer is None:
            return None
        return Grammar(answer, rules.text(), self._param)

    @property
    def _param(self) -> str:
        """What is most likely at fault if the grammar is."""
        if self.response is not None and self.choice.mode != "required":
            return self.response.param
        return self.tools[0].param if len(self.tools) == 1 else "tools"

    def _answer(self, rules: Rules) -> str | None:
        form, tools, parallel = self.format.grammar, self.tools, self.choice.parallel
        if tools and self.choice.mode == "required":
            return calls_only(rules, form, tools, parallel) if not self.raw else self._raw(rules)
        if self.response is not None:
            answer = rules.include(self.response)
            return f"{calls_only(rules, form, tools, parallel)} | {answer}" if tools else answer
        if tools and (self.choice.names or any(tool.strict for tool in tools)):
            return calls_in_text(rules, form, tools, parallel)
        return None

    def _raw(self, rules: Rules) -> str:
        assert self.raw is not None
        (marker, text), suffix = self._envelope(self.raw)
        syntax = self.raw.syntax
        body = any_text(rules) if syntax is None else rules.include(syntax)
        return f"{rules.mark(marker)} {quote(text)} {body} {rules.mark(suffix)}"


def read_raw(tool: Tool, suffix: str) -> ReadCalls:
    """A reader of a custom tool's input as it is, up to ``suffix`` or the end."""

    def read(calls: CallReader) -> Waiting[None]:
        scanner = calls.scanner
        calls.begin(tool)
        yield from scanner.until(suffix, lambda: calls.argue(scanner.drop()))
        calls.end()

    return read


def chosen(tools: Sequence[Tool], choice: ToolChoice) -> tuple[Tool, ...]:
    """The tools that may be called. Raises RequestError for a choice that cannot be met."""
    if missing := set(choice.names) - {tool.name for tool in tools}:
        raise RequestError(f"there is no tool {min(missing)!r} in tools", param="tool_choice")
    if choice.mode == "required" and not tools:
        raise RequestError("a call is required, but there are no tools", param="tool_choice")
    return choice.among(tools)
