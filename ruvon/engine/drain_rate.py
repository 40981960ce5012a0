"""How fast the queue drains: when a client that found it full should come again."""

from __future__ import annotations

from collections import deque

from ruvon.engine.types import Sequence
from ruvon.errors import QueueFullError

LEAST_RETRY, MOST_RETRY = 1.0, 60.0  # seconds
LATELY = 64  # sequences that finished last


class DrainRate:
    """Sequences and prompt tokens that have left lately, and how long that took."""

    def __init__(self) -> None:
        self._finished: deque[tuple[float, int]] = deque(maxlen=LATELY)  # when, prompt tokens

    def note(self, seq: Sequence, now: float) -> None:
        """A sequence is over, however it ended."""
        self._finished.append((now, seq.num_prompt))

    def seconds_for(self, error: QueueFullError, now: float) -> float:
        """How long it will take, at this rate, until there is room, within bounds."""
        if not self._finished:
            return LEAST_RETRY
        elapsed = now - self._finished[0][0]
        left = len(self._finished)
        if error.setting == "max_num_queued_tokens":
            left = max(sum(num_prompt for _, num_prompt in self._finished), 1)
        return min(max(error.excess * elapsed / left, LEAST_RETRY), MOST_RETRY)
