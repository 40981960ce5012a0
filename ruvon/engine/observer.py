"""Observer: an engine at work, for whoever looks at it or records it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import suppress

from ruvon.engine.engine import Engine, kind
from ruvon.engine.events import Header
from ruvon.engine.live import Standing
from ruvon.engine.recorder import Recorder
from ruvon.engine.recording import Recording
from ruvon.engine.steps import Pending
from ruvon.errors import RequestError


class Observer:
    """What `EngineLoop` lets be seen. Everything here happens on the event loop's thread."""

    def __init__(
        self, engine: Engine, pending: Collection[Pending], clock: Callable[[], float]
    ) -> None:
        """``pending`` are, at any time, the steps launched and not collected."""
        self.recorder = Recorder()  # of the last steps
        self._engine = engine
        self._pending = pending
        self._clock = clock

    @property
    def header(self) -> Header:
        """What the engine was made of."""
        return self._engine.header

    @property
    def cached_blocks(self) -> list[int]:
        """Free blocks that can be found as a prefix."""
        return self._engine.cached_blocks

    def stand(self) -> Standing:
        """Where the engine is, for whoever watches what comes next in `recorder`."""
        plans = [step.plan for step in self._pending]
        return self._engine.stand(plans, self.recorder.end, self._clock())

    def stepped(self, pending: Pending, now: float) -> None:
        """A step has been collected."""
        stats, failure = self._engine.stats, self._engine.failure
        self.recorder.stepped(
            pending.plan,
            pending.at,
            now,
            stats,
            pending.work,
            self._engine.finished,
            "" if failure is None else kind(failure).strip(" ()"),
            pending.not_started,
        )

    async def record(self, most_steps: int, seconds: float) -> Recording:
        """Record so many steps, or those of so many seconds if they are fewer. Raises
        `RequestError` if somebody else records."""
        if self._engine.recording is not None:
            raise RequestError("Another recording is being made.")
        full = asyncio.Event()

        def end() -> None:
            self._engine.recording = None
            full.set()

        recording = self._engine.record(self._pending, most_steps, end)
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(full.wait(), seconds)
        finally:
            if self._engine.recording is recording:
                end()
        return recording
