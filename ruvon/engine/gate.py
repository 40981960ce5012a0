"""Gate: slow motion, for whoever watches an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf

LOOK = 0.5  # seconds between two looks at whether a gate still counts


class Gate:
    """Lets steps through one by one, ``pace`` seconds apart or when `step` is called, as long as
    somebody goes on asking for that: who leaves lets the engine run again."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pace = 0.0
        self._until = 0.0
        self._through = 0  # steps that may pass at once
        self._passed_at = -inf  # the first step passes, however lately the clock began
        self._changed = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether nothing is held back."""
        return self._clock() >= self._until

    @property
    def pace(self) -> float:
        """Seconds between two steps; 0 where the gate is open."""
        return 0.0 if self.is_open else self._pace

    def hold(self, pace: float, seconds: float) -> None:
        """From now on and for so many seconds, let a step through every ``pace`` seconds."""
        self._pace, self._until = pace, self._clock() + seconds
        self._changed.set()

    def open(self) -> None:
        """Hold nothing back."""
        self._until, self._through = 0.0, 0
        self._changed.set()

    def step(self) -> None:
        """Let one through now."""
        self._through += 1
        self._changed.set()

    async def wait(self, beat: Callable[[], object]) -> None:
        """Wait for the next step's turn. ``beat`` is called now and then: to be held is not to be
        stuck."""
        while not self.is_open and not self._through:
            left = self._passed_at + self._pace - self._clock()
            if left <= 0:
                break
            beat()
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), min(left, LOOK))
            except TimeoutError:
                continue
        self._through = max(self._through - 1, 0)
        self._passed_at = self._clock()
        beat()
