"""Models of which nothing but text is expected."""

from __future__ import annotations

from collections.abc import Sequence

from ruvon.deltas import Delta
from ruvon.models.text_stream import TextStream


class PlainParser:
    """All output is the answer's text."""

    def __init__(self, text: TextStream) -> None:
        self._text = text

    def push(self, ids: Sequence[int]) -> list[Delta]:
        text = self._text.push(ids)
        return [Delta(text=text)] if text else []

    def finish(self) -> list[Delta]:
        text = self._text.finish()
        return [Delta(text=text)] if text else []
