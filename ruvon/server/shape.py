"""How much a JSON body holds, counted before it is parsed.

A parser works on a whole body in one native call, during which no other thread of the process
runs, the event loop's included. What it costs is not the bytes but the values: four megabytes are
parsed in 5 ms if they are one text, and in half a second if they are empty lists. So large bodies
are counted first, in slices, and what holds too much is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ruvon.errors import RequestError

SLICE = 1 << 16  # bytes looked at in one native call


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one body may hold: as much as is parsed in some 10 ms each."""

    values: int  # numbers, strings, lists and objects
    keys: int = 32_768  # of objects
    containers: int = 16_384  # lists and objects among them
    escapes: int = 524_288  # backslashes in strings

    @classmethod
    def of_context(cls, num_tokens: int) -> Bounds:
        """For a model that reads so many tokens: a prompt of ids, and tools or messages."""
        return cls(values=2 * num_tokens + 65_536)


def check_shape(body: bytes, bounds: Bounds) -> None:
    """Raises RequestError for a body that holds more than ``bounds``, valid JSON or not."""
    values = keys = containers = escapes = 0
    for outside, backslashes in slices(body):
        opened = outside.count(b"[") + outside.count(b"{")
        containers += opened
        values += opened + outside.count(b",")
        keys += outside.count(b":")
        escapes += backslashes
        for count, limit, what in (
            (values, bounds.values, "values"),
            (keys, bounds.keys, "keys"),
            (containers, bounds.containers, "lists and objects"),
            (escapes, bounds.escapes, "escapes"),
        ):
            if count > limit:
                raise RequestError(f"The body holds more than {limit} {what}.", None, "too_large")


def slices(body: bytes) -> Iterator[tuple[bytes, int]]:
    """Of each slice, what is outside of strings, and the backslashes in it."""
    at = inside = 0
    while at < len(body):
        piece = body[at : at + SLICE]
        backslashes = len(piece) - len(piece.rstrip(b"\\"))
        if backslashes % 2 and len(piece) > 1:
            piece = piece[:-1]  # it escapes the next slice's first character
        at += len(piece)
        plain = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = plain.split(b'"')
        yield b"".join(parts[inside::2]), piece.count(b"\\")
        inside ^= ~len(parts) & 1
