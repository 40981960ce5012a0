"""What a completion must be: a value, which the engine compiles and every sampled token obeys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar in llguidance's dialect of Lark.

    ``start`` is the right-hand side of its first rule, so that a grammar can be a part of another;
    ``param`` is the request's field that errors name.
    """

    start: str
    rules: str = ""
    param: str = "response_format"

    def lark(self) -> str:
        """The whole text."""
        return f"start: {self.start}\n{self.rules}"
