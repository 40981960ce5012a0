"""What people and machines see of a running ruvon: `logs`, `metrics`, and the progress of a start.

Leaves that import no engine; only `metrics` and its collectors import prometheus_client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = Callable[[str, float], None]
"""Called while starting: (phase, share done from 0 to 1)."""


def silent(phase: str, share: float) -> None:
    """A `Progress` that nobody watches."""
