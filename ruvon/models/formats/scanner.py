"""Text that comes in pieces, read as if it were all there.

A reader is a generator: it looks at the text that is still unread, and yields where it needs more
to decide. So what it makes of a text cannot depend on where the pieces were cut, and reads like a
parser of a whole text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Waiting: TypeAlias = Generator[None, None, T]

SPACES = re.compile(r"[ \t\r\n]*")
OUTSIDE = re.compile(r'["{}\[\]]')  # what matters between a value's strings
INSIDE = re.compile(r'["\\]')  # and within one
CHARACTERS = re.compile(
    r"""(?:[^"\\]|\\[^u]|\\u(?:[dD][89abAB]..(?:\\u....|(?!\\?\Z|\\u.{0,3}\Z))|(?![dD][89abAB])....))*""",
    re.DOTALL,
)  # of a string, as far as they are there whole: two escapes may be one character
SCALAR = re.compile(r"[^\s,}\]]*")


class Scanner:
    """What came and is not read yet is ``text[at:]``; what was read since `drop` is before that."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False

    def feed(self, text: str) -> None:
        self.text += text

    def drop(self) -> str:
        """Let go of what has been read."""
        read, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
        return read

    def peek(self) -> Waiting[str]:
        """The next character; empty at the end."""
        while self.at == len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def take(self, literal: str) -> Waiting[bool]:
        """Read ``literal`` if it is what follows; waits only while that is open."""
        while True:
            rest = self.text[self.at : self.at + len(literal)]
            if rest == literal:
                self.at += len(literal)
                return True
            if self.ended or not literal.startswith(rest):
                return False
            yield

    def close(self, end: str) -> Waiting[None]:
        """Read white space and ``end`` after it, if it is there, or what came of it."""
        yield from self.spaces()
        if not (yield from self.take(end)) and self.ended and end.startswith(self.text[self.at :]):
            self.at = len(self.text)

    def spaces(self) -> Waiting[str]:
        """Read white space, up to the next character, and give that."""
        yield from self.span(SPACES)
        return self.text[self.at : self.at + 1]

    def span(self, pattern: re.Pattern[str]) -> Waiting[str]:
        """Read as far as a pattern of single characters goes."""
        while True:
            match = pattern.match(self.text, self.at)
            assert match is not None
            if match.end() < len(self.text) or self.ended:
                self.at = match.end()
                return match[0]
            yield

    def until(self, end: str, seen: Callable[[], None] | None = None) -> Waiting[bool]:
        """Read up to ``end``, and over it; False if it never comes, and then all is read.

        ``seen`` is called, and may `drop`, whenever more has been read that is not ``end``.
        """
        while (found := self.text.find(end, self.at) if end else -1) < 0:
            self.at = len(self.text) - (0 if self.ended else half_marker(self.text[self.at :], end))
            if seen is not None:
                seen()
            if self.ended:
                return False
            yield
        self.at = found
        if seen is not None:
            seen()
        self.at += len(end)
        return True

    def characters(self) -> Waiting[None]:
        """Read of the inside of a JSON string what can be told, at least one character."""
        while True:
            match = CHARACTERS.match(self.text, self.at)
            assert match is not None
            if match.end() > self.at or self.ended:
                self.at = match.end() if match.end() > self.at else len(self.text)
                return
            yield

    def value(self, seen: Callable[[], None] | None = None) -> Waiting[bool]:
        """Read one JSON value, judged by its quotes and brackets only; False if it never ends.

        ``seen`` is called whenever more of it has been read, and may `drop` that.
        """
        if (yield from self.peek()) not in '"{[':
            return bool((yield from self.span(SCALAR)))
        depth, quoted = 0, False
        while True:
            match = (INSIDE if quoted else OUTSIDE).search(self.text, self.at)
            waits = match is None or (match[0] == "\\" and match.end() == len(self.text))
            if waits:
                self.at = len(self.text) if match is None or self.ended else match.start()
                if seen is not None:
                    seen()
                if self.ended:
                    return False
                yield
                continue
            assert match is not None
            self.at = match.end() + (match[0] == "\\")
            if match[0] == '"':
                quoted = not quoted
            elif match[0] != "\\":
                depth += 1 if match[0] in "{[" else -1
            if depth <= 0 and not quoted:
                if seen is not None:
                    seen()
                return True


def half_marker(text: str, *markers: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of a marker."""
    longest = max(map(len, markers), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in markers):
            return size
    return 0
