"""How long sequences wait for their first step, and for what.

Nobody overtakes the first of the queue, so all that are in it wait for the same thing at a time. A
clock for each thing runs while it is what they wait for; how far each has run since a sequence came
tells what that one has waited for, at the price of one addition a step.
"""

from __future__ import annotations

from typing import Final

from ruvon.engine.types import Sequence, Wait, WaitReason

STEP: Final = "step"  # the end of the step under way
PLACES: Final = "places"  # a place among the running: --max-num-seqs, or the way of batching
BLOCKS: Final = "blocks"  # cache blocks
PREFIX: Final = "prefix"  # another's computing what this one begins with, too
PROMPTS: Final = "prompts"  # it runs, but others' tokens fill the steps

LEAST = 1e-6  # seconds; sums of them are wrong by less


class Waits:
    """The clocks. ``reason`` is what the queue waits for now."""

    def __init__(self) -> None:
        self.reason: WaitReason = STEP
        self._seconds: dict[WaitReason, float] = {STEP: 0.0, PLACES: 0.0, BLOCKS: 0.0}
        self._now = 0.0
        self._num_joined = 0

    def turn(self, now: float) -> None:
        """Until ``now`` it was `reason` that the queue waited for."""
        self._seconds[self.reason] += max(now - self._now, 0.0)
        self._now = now

    def enter(self, seq: Sequence) -> None:
        """A sequence begins to wait."""
        self.turn(seq.arrived_at)
        seq.wait = Wait(tuple(self._seconds.values()), self._num_joined)

    def join(self, seq: Sequence) -> None:
        """A sequence runs from now on. It may come back; only what was before its first step
        counts."""
        wait = seq.wait
        if seq.scheduled_at is not None:
            return
        wait.num_before = self._num_joined - wait.num_joined
        self._num_joined += 1
        wait.seconds = {
            reason: seconds - before
            for (reason, seconds), before in zip(self._seconds.items(), wait.clocks, strict=True)
            if seconds > before
        }
        wait.follows = not seq.tables

    def begin(self, seq: Sequence) -> None:
        """Its first step is planned: what it waited since it has joined."""
        wait = seq.wait
        rest = self._now - seq.arrived_at - sum(wait.seconds.values())
        if rest > LEAST:
            wait.seconds[PREFIX if wait.follows else PROMPTS] = rest
