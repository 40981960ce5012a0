"""How a response of HTTP/1.1 is framed: its head, and where its body ends.

A body is passed on as it is framed. All that is looked for is its end, so that no byte is copied.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

STATUS_LINE = re.compile(r"HTTP/1\.([01]) (\d{3})(?: .*)?")
USUAL_SIZES = {b"%x" % size: size for size in range(1, 4096)}  # of chunks, as they are written
CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?")
MOST_HEAD = 65_536  # bytes
MOST_LINE = 4096  # bytes of a chunk's size, extensions included, or of a trailer
BODILESS = frozenset({204, 304})


class FramingError(ConnectionError):
    """What came is no HTTP: the connection is of no use any more."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a response begins with."""

    status: int
    headers: tuple[tuple[str, str], ...]
    keeps_open: bool  # whether the connection can be used again

    def get(self, name: str) -> str | None:
        """A header's value; ``name`` is in small letters."""
        return next((value for key, value in self.headers if key.lower() == name), None)


def parse_head(data: bytes) -> Head:
    """Everything before the empty line. Raises FramingError."""
    first, *lines = data.decode("latin-1").split("\r\n")
    match = STATUS_LINE.fullmatch(first)
    if match is None:
        raise FramingError(f"no status line: {first[:80]!r}")
    headers = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise FramingError(f"no header: {line[:80]!r}")
        headers.append((name, value.strip()))
    head = Head(int(match[2]), tuple(headers), True)
    wanted = "keep-alive" if match[1] == "0" else "close"
    said = (head.get("connection") or "").lower()
    return Head(head.status, head.headers, (wanted in said) == (match[1] == "0"))


class Body(Protocol):
    """Follows a body to its end."""

    chunked: bool
    done: bool

    @property
    def whole(self) -> bool:
        """Whether what was fed ends where something else may follow: between two chunks."""

    def feed(self, data: bytes) -> bytes:
        """What of the bytes is to be passed on. That a body in chunks is over is left out."""


def body_of(method: str, head: Head) -> Body:
    """What follows a head. Raises FramingError."""
    if method == "HEAD" or head.status in BODILESS:
        return Sized(0)
    if (head.get("transfer-encoding") or "").lower() == "chunked":
        return Chunked()
    length = head.get("content-length")
    if length is None:
        return Unsized()
    if not length.isascii() or not length.isdigit():
        raise FramingError(f"Content-Length: {length[:80]!r}")
    return Sized(int(length))


class Sized:
    """So many bytes."""

    chunked = False

    def __init__(self, size: int) -> None:
        self.left = size
        self.done = size == 0

    @property
    def whole(self) -> bool:
        return self.done

    def feed(self, data: bytes) -> bytes:
        """Raises FramingError for more than was announced."""
        if len(data) > self.left:
            raise FramingError("more than Content-Length")
        self.left -= len(data)
        self.done = self.left == 0
        return data


class Unsized:
    """Whatever comes until the connection ends."""

    chunked = False
    done = False
    whole = True

    def feed(self, data: bytes) -> bytes:
        return data


class Chunked:
    """Chunks, each of which tells its size; passed on as they are."""

    chunked = True

    def __init__(self) -> None:
        self.done = False
        self._left = 0  # of a chunk, with the line's end behind it
        self._line = b""  # the beginning of a line that has not ended
        self._ending = False  # the last chunk has come, and trailers may follow

    @property
    def whole(self) -> bool:
        return self._left == 0 and not self._line

    def feed(self, data: bytes) -> bytes:
        """Raises FramingError."""
        if self._line:
            data, self._line = self._line + data, b""
        if self._ending:
            self._feed_trailers(data)
            return b""
        at, size = self._left, len(data)  # where the next chunk begins
        while at < size:
            end = data.find(b"\r\n", at)
            if end < 0:
                self._left = 0
                self._hold(data[at:])
                return data[:at]
            line = data[at:end]
            length = USUAL_SIZES.get(line) or self._size(line)
            if length == 0:
                self._left, self._ending = 0, True
                self._feed_trailers(data[end + 2 :])
                return data[:at]
            at = end + 2 + length + 2
        self._left = at - size
        return data

    def _size(self, line: bytes) -> int:
        match = CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise FramingError(f"no chunk: {line[:80]!r}")
        return int(match[1], 16)

    def _hold(self, line: bytes) -> None:
        if len(line) > MOST_LINE:
            raise FramingError("a line without end")
        self._line = line

    def _feed_trailers(self, data: bytes) -> None:
        """Drop them; an empty line is the end."""
        while not self.done:
            end = data.find(b"\r\n")
            if end < 0:
                self._hold(data)
                return
            self.done = end == 0
            data = data[end + 2 :]
        if data:
            raise FramingError("more than the last chunk")


def payload(framed: bytes) -> bytes:
    """What chunks hold, the last of which tells no end."""
    pieces, at = [], 0
    while at < len(framed):
        end = framed.index(b"\r\n", at)
        match = CHUNK_SIZE.fullmatch(framed, at, end)
        assert match is not None, "`Chunked` has looked at them"
        size = int(match[1], 16)
        pieces.append(framed[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(pieces)
