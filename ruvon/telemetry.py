"""Logs, metrics and progress: what people and machines see of a running ruvon."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, float], None]
"""Called while starting: (phase, share done from 0 to 1)."""


def silent(phase: str, share: float) -> None:
    """A `Progress` that nobody watches."""
