"""What is told of a completion when it is over: one record for metrics, log, traces and clients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Finished:
    """A completion that is over, however it ended. A phase that it never reached took 0 seconds."""

    reason: str  # stop, length, abort, error or deadline
    num_prompt: int
    num_output: int
    num_cached: int  # of the prompt
    max_tokens: int
    n: int  # completions of the same prompt
    arrived_at: float  # seconds, monotonic
    queue: float  # seconds from there to its first step
    prefill: float  # seconds from there to its first token
    decode: float  # seconds from there to its end
    num_before: int = 0  # that came to run while it waited for its turn
    waits: Mapping[str, float] = field(default_factory=dict)
    """What it waited for in the queue (`ruvon.engine.waits`), and for how many seconds."""
    num_chunks: int = 0  # steps that computed something of its prompt
    num_preempted: int = 0
    corrupted: bool = False  # whether what was computed for it were no numbers

    @property
    def total(self) -> float:
        """Seconds from arrival to end."""
        return self.queue + self.prefill + self.decode

    @property
    def ended_at(self) -> float:
        return self.arrived_at + self.total


def last_of(finished: Iterable[Finished]) -> Finished | None:
    """The one that a request of several completions waited for."""
    return max(finished, key=lambda each: each.ended_at, default=None)
