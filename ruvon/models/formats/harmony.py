"""Harmony, the format of gpt-oss: messages with headers, told apart by tokens of their own.

An answer is several messages. A header says on which channel one is (analysis, commentary, final)
and, of a call, who is called; where models break its rules, as they do, what they meant is
guessed, and nothing is lost. https://github.com/openai/harmony (docs/format.md)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ruvon.deltas import Delta
from ruvon.models.formats.reader import CallReader, EnoughError, loads, settle
from ruvon.models.formats.scanner import Scanner, Waiting
from ruvon.models.formats.tools import Tool
from ruvon.models.text_stream import TextStream

FUNCTIONS = "functions"  # whose names are those of a client's tools
BROWSER, PYTHON = "browser", "python"  # that gpt-oss was trained with
ANALYSIS, COMMENTARY, ANSWER = "analysis", "commentary", "final"


class Mark(StrEnum):
    """The tokens between texts."""

    START = "<|start|>"
    CHANNEL = "<|channel|>"
    CONSTRAIN = "<|constrain|>"
    MESSAGE = "<|message|>"
    END = "<|end|>"
    CALL = "<|call|>"
    RETURN = "<|return|>"


STOPS = (Mark.RETURN, Mark.CALL)  # of generation; END is only a message's


def find_marks(added_ids: Mapping[str, int]) -> dict[str, int] | None:
    """The ids of the marks; None if a vocabulary lacks one, and so its model speaks no harmony."""
    if not all(mark in added_ids for mark in Mark):
        return None
    return {mark: added_ids[mark] for mark in Mark}


def stop_ids(marks: Mapping[str, int], declared: Iterable[int]) -> tuple[int, ...]:
    """What ends an answer, whatever files have ``declared``: early ones lack CALL, and converters
    have taken END for an end of all."""
    ends = dict.fromkeys((*(marks[stop] for stop in STOPS), *declared))
    return tuple(id for id in ends if id != marks[Mark.END])


# ---------------------------------------------------------------------- headers

SIGNS = {Mark.START: b"\xff", Mark.CHANNEL: b"\xfe", Mark.CONSTRAIN: b"\xfd"}
"""What stands for a mark in a header: bytes that no text has, as one that is spelt is text."""
NO_SIGNS = bytes.maketrans(b"\xfd\xfe\xff", b"\xfc\xfc\xfc")  # no text either
MARKED = re.compile(rb"[\xfd-\xff]")
WORD = re.compile(rb"[\xfd-\xff]|[^\s\xfd-\xff]+")
CHANNEL_NAME = re.compile(rb"analysis|commentary|final")
OTHER_ROLES = (b"user", b"system", b"developer", b"tool")
TYPES = (b"json", b"code", b"text")
CALLED = (b"to=", b"functions.")  # begin who is called; models forget the first
KNOWN = (b"assistant", *OTHER_ROLES, *TYPES, b"analysis", b"commentary", b"final", *CALLED)
MOST_UNKNOWN = 8  # words; a header that has more is none
MOST_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Header:
    """``rest`` is what is no header, if that was never ended: text without one. ``foreign``: the
    message is not the assistant's."""

    channel: str | None = None
    recipient: str | None = None
    rest: bytes = b""
    foreign: bool = False


def read_header(data: bytes, ended: bool) -> Header:
    """A header that has ``ended`` as it should. Of what was only taken for one, the words that are
    known make it, and the rest is text."""
    if not ended and not MARKED.search(data):
        return Header(rest=text_in(data))
    words = [*WORD.finditer(data)]
    channel: str | None = None
    recipient: str | None = None
    foreign, unknown = is_foreign([word[0] for word in words[:2]]), []
    for word in words[2 if foreign else 0 :]:
        text = word[0]
        if (name := CHANNEL_NAME.fullmatch(text.rstrip(b"?!.,:;"))) is not None:
            channel = channel or name[0].decode()
        elif text.startswith(CALLED):
            recipient = recipient or text.removeprefix(b"to=").decode(errors="replace")
        elif text not in KNOWN and not MARKED.match(text):
            unknown.append(word)
    if not ended and unknown:
        return Header(channel, recipient, text_in(data[unknown[0].start() :]), foreign)
    if channel is None and (found := CHANNEL_NAME.search(b" ".join(word[0] for word in unknown))):
        channel = found[0].decode()
    return Header(channel, recipient, foreign=foreign)


def is_foreign(words: Sequence[bytes]) -> bool:
    """Whether a header's first words name another author: a role, or a tool with a result."""
    return len(words) == 2 and words[0] == SIGNS[Mark.START] and (
        words[1] in OTHER_ROLES or words[1].startswith(b"functions.")
    )  # fmt: skip


def may_be_header(data: bytes) -> bool:
    """Whether what came so far may still become one."""
    if len(data) > MOST_BYTES or b"\n" in data.strip():
        return False
    words = (word for word in WORD.findall(data) if not word.startswith(CALLED))
    return sum(word not in KNOWN and not MARKED.match(word) for word in words) <= MOST_UNKNOWN


def text_in(rest: bytes) -> bytes:
    """What a header's rest says: nothing, if it is the beginning of a word of a header at which
    the answer was cut off."""
    rest = rest.lstrip()
    for mark, sign in SIGNS.items():
        rest = rest.replace(sign, mark.encode())
    return b"" if any(word.startswith(rest.rstrip()) for word in KNOWN) else rest


# ---------------------------------------------------------------------- the parser


@dataclass(frozen=True, slots=True)
class Callee:
    """Who can be called. A ``raw`` tool takes text as it is."""

    tool: Tool
    raw: bool = False


class HarmonyParser:
    """Reads one answer. It never fails, whatever comes."""

    def __init__(
        self,
        text: TextStream,
        marks: Mapping[str, int],
        callees: Mapping[str, Callee],
        *,
        parallel: bool = True,
        channel: str | None = None,
    ) -> None:
        """``callees`` are found by the names that headers have. The answer begins in a header, or
        within a message if that is on a ``channel``."""
        self._text = text
        self._marks = {id: Mark(text) for text, id in marks.items()}
        self._callees = callees
        self._calls = CallReader(
            Scanner(), {callee.tool.name: callee.tool for callee in callees.values()}, parallel
        )
        self._header: bytes | None = b""  # so far; None within a message
        self._num_header = 0  # tokens
        self._channel: str | None = None  # of the message that is being read
        self._steps: Waiting[None] | None = None  # what reads a call
        self._joint = ""  # goes before a text that follows another
        self._spoken: set[bool] = set()  # whether there has been reasoning (True), and text
        self._num_reasoning = 0
        if channel is not None:
            self._open(Header(channel))

    def push(self, ids: Sequence[int]) -> list[Delta]:
        for id in ids:
            if self._text.over:
                break
            self._num_reasoning += self._thinking
            mark = self._marks.get(id)
            if mark is not None:
                self._text.skip(id)
                self._take_mark(mark)
            elif self._header is None:
                self._say(self._text.push((id,)))
            else:
                self._num_header += 1
                self._take_header(self._text.skip(id))
        return self._taken()

    def finish(self) -> list[Delta]:
        if self._header is None:
            self._close()
        elif not self._text.over:
            self._close_header()
        return self._taken()

    @property
    def _thinking(self) -> bool:
        return self._header is None and self._channel == ANALYSIS and self._steps is None

    def _taken(self) -> list[Delta]:
        deltas, self._calls.deltas = self._calls.deltas, []
        if self._num_reasoning:
            deltas = deltas or [Delta()]
            deltas[0].num_reasoning, self._num_reasoning = self._num_reasoning, 0
        return deltas

    # ------------------------------------------------------------------ headers

    def _take_mark(self, mark: Mark) -> None:
        """Marks that are missing or written twice are no hindrance."""
        if self._header is not None:
            self._num_header += 1
        elif mark in (Mark.MESSAGE, Mark.CONSTRAIN):
            return
        else:
            self._close()
        if self._text.over or self._header is None:
            return
        if mark is Mark.MESSAGE:
            self._open(read_header(self._header, ended=True))
        elif mark in (Mark.CHANNEL, Mark.CONSTRAIN):
            if len(self._header) < MOST_BYTES:
                self._header += SIGNS[mark]
        else:
            self._close_header()
        if mark is Mark.START and not self._text.over:
            self._header, self._num_header = SIGNS[mark], 1

    def _take_header(self, data: bytes) -> None:
        assert self._header is not None
        self._header += data.translate(NO_SIGNS)
        if not may_be_header(self._header):
            self._open(read_header(self._header, ended=False))

    def _close_header(self) -> None:
        """A header without a message: it may have been the message."""
        assert self._header is not None
        header = read_header(self._header, ended=False)
        self._header, self._num_header = b"", 0
        if header.rest:
            self._open(header)
            self._close()

    def _open(self, header: Header) -> None:
        """The message of a header begins."""
        if header.foreign:  # the model has gone on for others
            self._text.end()
            return
        self._header, self._channel, self._steps = None, header.channel, None
        callee = self._callees.get(header.recipient or "")
        if callee is not None:
            self._calls.scanner = Scanner()
            self._steps = self._call(callee)
            next(self._steps)
        elif self._channel == ANALYSIS:
            self._num_reasoning += self._num_header
        self._joint = "\n\n" if (self._channel == ANALYSIS) in self._spoken else ""
        self._num_header = 0
        if header.rest:
            self._say(self._text.put(header.rest))

    # ------------------------------------------------------------------ messages

    def _close(self) -> None:
        """The message has ended."""
        self._say(self._text.cut())
        if self._steps is not None:
            self._calls.scanner.ended = True
            self._go_on()
        self._header, self._num_header, self._steps = b"", 0, None

    def _say(self, text: str) -> None:
        if self._steps is None:
            self._tell(text)
        elif text:
            self._calls.scanner.feed(text)
            self._go_on()

    def _go_on(self) -> None:
        assert self._steps is not None
        try:
            next(self._steps, None)
        except EnoughError:
            self._text.end()

    def _tell(self, text: str) -> None:
        """Text of a message that is no call."""
        if not text:
            return
        thought = self._channel == ANALYSIS
        text, self._joint = self._joint + text, ""
        self._spoken.add(thought)
        self._calls.add(Delta(reasoning=text) if thought else Delta(text=text))

    def _call(self, callee: Callee) -> Waiting[None]:
        """Read what a tool is called with: an object as it comes. What is neither that nor nothing
        at all is no call."""
        yield
        scanner, calls, tool = self._calls.scanner, self._calls, callee.tool
        if callee.raw:
            calls.begin(tool)
            yield from scanner.until("", lambda: calls.argue(scanner.drop()))
        elif (yield from is_object(scanner)):
            calls.begin(tool)
            yield from calls.arguments(tool)
        else:
            yield from scanner.until("")
            written = scanner.drop()
            argument = whole_argument(written, tool)
            if argument is None:
                self._tell(written)
                return
            calls.begin(tool)
            calls.argue(argument)
        while not scanner.ended:  # what follows an object says nothing
            scanner.at = len(scanner.text)
            scanner.drop()
            yield
        calls.end()


def is_object(scanner: Scanner) -> Waiting[bool]:
    """Whether an object begins. White space before it is let go; nothing else is read."""
    begins = (yield from scanner.spaces()) == "{"
    if begins:
        scanner.drop()
        scanner.at = 1
        begins = (yield from scanner.spaces()) in ('"', "}", "")
    scanner.at = 0
    return begins


def whole_argument(written: str, tool: Tool) -> str | None:
    """What a tool is called with, where it is no object: a custom tool with any text, a function
    with nothing at all or with JSON in JSON. None if it makes no sense."""
    value = loads(written)
    if tool.custom:
        return value if isinstance(value, str) else written
    inner = loads(value) if isinstance(value, str) else {} if value is None else value
    sensible = isinstance(inner, dict) and (value is not None or written.strip() in ("", "null"))
    return settle(written.strip(), tool) if sensible else None
