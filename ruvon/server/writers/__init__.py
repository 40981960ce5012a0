"""How each API says what is generated: writers, which fold deltas.

A writer is fed a request's deltas, and gives the events of a stream or one object. Both are made
of the same chunks: an object is its chunks put together, as a client would do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ruvon.deltas import Delta
from ruvon.server.writers.envelope import Tally


class Writer(Protocol):
    """One request's answer. It is written as a stream (``opening``, ``events``, ``closing``) or as
    a whole (``feed``, ``result``)."""

    @property
    def id(self) -> str: ...

    @property
    def tally(self) -> Tally: ...

    @property
    def done(self) -> bytes:
        """What ends a stream, whatever happened."""

    def error(self, error: Exception) -> bytes:
        """Events for a failure in mid-stream."""

    def opening(self) -> bytes:
        """Events that go before all others."""

    def events(self, delta: Delta) -> bytes:
        """Events for what a delta says; empty if it shows nothing."""

    def closing(self) -> bytes:
        """Events after all others."""

    def feed(self, delta: Delta) -> object:
        """Take a delta into the whole."""

    def result(self) -> Mapping[str, object]:
        """The whole, once every completion has ended."""
