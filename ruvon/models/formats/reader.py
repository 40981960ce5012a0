"""The parser of all formats whose models mark their calls and their reasoning in the text.

That something is a call is certain only once its name has been read. Until then it is held back;
what turns out to be no call is text, so nothing that a model writes is lost.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ruvon.deltas import Delta, ToolCall
from ruvon.models.formats.scanner import Scanner, Waiting, half_marker
from ruvon.models.formats.tools import INPUT, Tool
from ruvon.models.text_stream import TextStream

ESCAPE = re.compile(r"\\u[dD][89abAB]..\\u....|\\u....|\\.", re.DOTALL)
BLANKS = 64  # white space at the end of a text that is held back: it goes if a marker follows


class NotACallError(Exception):
    """What has been read since the last call began is text."""


class EnoughError(Exception):
    """There may be no further call."""


ReadCalls: TypeAlias = "Callable[[CallReader], Waiting[None]]"
"""Reads the call or calls after a marker, by means of a `CallReader`."""

MakeDelta: TypeAlias = Callable[[str], Delta]


@dataclass(frozen=True, slots=True)
class Markers:
    """What the parser looks for."""

    starts: tuple[str, ...] = ()  # of calls
    bare: bool = False  # a call may also begin the answer, without any
    think: tuple[str, str] | None = None  # around reasoning, if the model reasons
    shown: frozenset[int] = frozenset()  # the tokens of these and others that calls are made of


class CallReader:
    """The calls of one completion: reads their parts, and gives them out."""

    def __init__(self, scanner: Scanner, tools: Mapping[str, Tool], parallel: bool) -> None:
        self.scanner = scanner
        self.deltas: list[Delta] = []
        self.num_calls = 0
        self.marker = ""  # that is being followed
        self._tools = tools
        self._parallel = parallel
        self._custom = False

    def add(self, delta: Delta) -> None:
        """Give out a delta, joined to the one before if that is of the same kind."""
        last = self.deltas[-1] if self.deltas else None
        if delta.text and last is not None and last.text:
            last.text += delta.text
        elif delta.reasoning and last is not None and last.reasoning:
            last.reasoning += delta.reasoning
        elif delta.text or delta.reasoning:
            self.deltas.append(delta)

    def tool(self, name: object) -> Tool:
        """The tool of that name. Raises NotACallError if none has it."""
        tool = self._tools.get(name) if isinstance(name, str) else None
        if tool is None:
            raise NotACallError
        return tool

    def begin(self, tool: Tool) -> None:
        """It is a call of ``tool``, whatever follows."""
        self.scanner.drop()
        self._custom = tool.custom
        call = ToolCall(self.num_calls, new_call_id(), tool.name, custom=tool.custom)
        self.deltas.append(Delta(tool_call=call))
        self.num_calls += 1

    def argue(self, arguments: str) -> None:
        """More of the arguments of the call that has begun."""
        if not arguments:
            return
        last = self.deltas[-1].tool_call if self.deltas else None
        if last is not None and last.id is None:
            arguments = last.arguments + arguments
            self.deltas.pop()
        call = ToolCall(self.num_calls - 1, arguments=arguments, custom=self._custom)
        self.deltas.append(Delta(tool_call=call))

    def end(self) -> None:
        """The call is whole. Raises EnoughError if no other may follow."""
        if not self._parallel:
            raise EnoughError

    def arguments(self, tool: Tool) -> Waiting[None]:
        """Read the arguments of the call that has begun, as JSON: an object goes out as it comes,
        and just as it is written; of a custom tool's, what its input says."""
        scanner = self.scanner
        if tool.custom and (yield from self._input()):
            return
        if tool.custom or (yield from scanner.peek()) != "{":
            yield from scanner.value()
            self.argue(settle(scanner.drop(), tool))
        else:
            yield from scanner.value(lambda: self.argue(scanner.drop()))

    def _input(self) -> Waiting[bool]:
        """Read an object of a custom tool's input, and give out the input as it comes; False, and
        nothing is read, if that is not what it begins with."""
        scanner = self.scanner
        for part in ("{", f'"{INPUT}"', ":", '"'):
            yield from scanner.spaces()
            if not (yield from scanner.take(part)):
                scanner.at = 0
                return False
        scanner.drop()
        while (yield from scanner.peek()) not in ("", '"'):
            yield from scanner.characters()
            self.argue(unescaped(scanner.drop()))
        yield from scanner.take('"')
        while (following := (yield from scanner.spaces())) != "}":  # what else the object has
            if following and following in ",:":
                scanner.at += 1
            elif not (yield from scanner.value()):
                break
        yield from scanner.take("}")
        scanner.drop()
        return True


def settle(written: str, tool: Tool) -> str:
    """Arguments that have been read whole: JSON, or a custom tool's input."""
    value = loads(written)
    if isinstance(value, str):  # JSON in JSON, as some models write it
        return whole(value)
    if tool.custom and isinstance(value, dict) and isinstance(value.get(INPUT), str):
        return whole(value[INPUT])
    return "{}" if written in ("", "null") else written


def unescaped(text: str) -> str:
    """The inside of a JSON string; what is no escape stays as it is."""
    return whole(ESCAPE.sub(_escaped, text)) if "\\" in text else text


def _escaped(escape: re.Match[str]) -> str:
    value = loads(f'"{escape[0]}"')
    return value if isinstance(value, str) else escape[0]


def whole(text: str) -> str:
    """Text without halves of characters, which JSON can spell and nothing can encode."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def loads(text: str) -> Any:
    """JSON as models write it, with bare line breaks in strings; None if it is none."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class TurnParser:
    """One completion."""

    def __init__(
        self,
        text: TextStream,
        markers: Markers,
        read: ReadCalls,
        tools: Mapping[str, Tool],
        *,
        thinking: bool = False,
        parallel: bool = True,
        only: bool = False,
    ) -> None:
        """``thinking``: the prompt has opened the reasoning. Without ``parallel`` the completion
        ends with its first call. ``only``: a grammar lets nothing but calls be written, so what is
        none yet is one that was cut off."""
        text.show(markers.shown)
        self._text = text
        self._markers = markers
        self._start = re.compile("|".join(map(re.escape, markers.starts)) or "(?!)")
        self._read = read
        self._as_text = as_nothing if only else as_text
        self._thinking = thinking
        self._at_once = markers.think is None and parallel
        self._plain: tuple[re.Pattern[str], MakeDelta] | None = None
        self._scanner = Scanner()
        self._calls = CallReader(self._scanner, tools, parallel)
        self._steps = self._turn()
        next(self._steps)

    def push(self, ids: Sequence[int]) -> list[Delta]:
        if self._at_once:
            self._feed(self._text.push(ids))
            return self._taken()
        num_reasoning = 0
        for id in ids:
            if self._text.over:
                break
            before = self._thinking
            self._feed(self._text.push((id,)))
            num_reasoning += before or self._thinking
        return self._taken(num_reasoning)

    def finish(self) -> list[Delta]:
        self._scanner.ended = True
        self._feed(self._text.finish())
        return self._taken()

    def _feed(self, text: str) -> None:
        if self._plain is not None and not self._scanner.ended:  # most of the time
            pattern, delta = self._plain
            if pattern.fullmatch(text):
                self._calls.add(delta(text))
                return
        self._scanner.feed(text)
        next(self._steps, None)

    def _taken(self, num_reasoning: int = 0) -> list[Delta]:
        deltas, self._calls.deltas = self._calls.deltas, []
        if num_reasoning:
            deltas = deltas or [Delta()]
            deltas[0].num_reasoning = num_reasoning
        return deltas

    # ------------------------------------------------------------------ the text, part by part

    def _turn(self) -> Waiting[None]:
        yield
        try:
            if self._markers.think is not None:
                yield from self._reasoning(*self._markers.think)
            yield from self._answer()
        except EnoughError:
            self._text.end()

    def _reasoning(self, start: str, end: str) -> Waiting[None]:
        scanner = self._scanner
        yield from scanner.spaces()
        if not (yield from scanner.take(start)) and not self._thinking:
            scanner.at = 0
            return
        self._thinking = True
        yield from self._skip_spaces()
        pattern = re.compile(re.escape(end))
        yield from self._until(pattern, (end,), as_reasoning)
        self._thinking = False
        yield from self._skip_spaces()

    def _answer(self) -> Waiting[None]:
        if self._markers.bare and (yield from self._scanner.spaces()) == "{":
            yield from self._call("")
        self._scanner.at = 0
        starts = self._markers.starts
        while True:
            marker = yield from self._until(self._start, starts, self._as_text)
            if marker is None:
                return
            yield from self._call(marker)

    def _until(
        self, pattern: re.Pattern[str], markers: Sequence[str], delta: MakeDelta
    ) -> Waiting[str | None]:
        """Give out the text before a marker, but for the white space at its end; read that and the
        marker, and return it. None if all of the text has been given out."""
        scanner, plain = self._scanner, without_any(markers)
        while True:
            self._plain = None
            text = scanner.text
            found = pattern.search(text)
            end = found.start() if found else len(text) - half_marker(text, *markers)
            keep = max(len(text[:end].rstrip()), end - BLANKS)
            if found is None and scanner.ended:
                keep = len(text)
            self._calls.add(delta(text[:keep]))
            scanner.at = keep
            scanner.drop()
            if found is not None:
                scanner.at = found.end() - keep
                return found[0]
            if scanner.ended:
                return None
            if not scanner.text:
                self._plain = plain, delta
            yield

    def _call(self, marker: str) -> Waiting[None]:
        """Read what follows a marker: calls, or else more text."""
        calls = self._calls
        before, calls.marker = calls.num_calls, marker
        try:
            yield from self._read(calls)
        except NotACallError:
            calls.add(self._as_text(self._scanner.drop()))
        if calls.num_calls > before:
            yield from self._skip_spaces()

    def _skip_spaces(self) -> Waiting[None]:
        yield from self._scanner.spaces()
        self._scanner.drop()


def as_text(text: str) -> Delta:
    return Delta(text=text)


def as_nothing(text: str) -> Delta:
    return Delta()


def as_reasoning(text: str) -> Delta:
    return Delta(reasoning=text)


def without_any(markers: Sequence[str]) -> re.Pattern[str]:
    """Text that no marker begins in, and that does not end in white space."""
    firsts = re.escape("".join({marker[0] for marker in markers}))
    return re.compile(rf"[^{firsts}]*[^{firsts}\s]" if firsts else r"(?s:.*)\S")
