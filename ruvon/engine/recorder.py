"""Recorder: the last steps of an engine, in a ring, for traces and for a page that watches.

It holds numbers, no token: what a step cost, who was in it, which blocks it added, who came and who
left. Most of a step's chunks are single tokens of sequences that go on; of those only the ids are
kept, in a tuple that the plan has anyway, so that a step of hundreds of rows costs microseconds.
What is kept consists of tuples of numbers, which the garbage collector does not walk through.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice

from ruvon.engine.types import Endings, NotStarted, Plan, StepStats, Work

ROW_BYTES = 8
CHUNK_BYTES = 160
STEP_BYTES = 700  # with its stats, and what it is made of


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request's sequence began to wait."""

    at: float  # seconds, monotonic
    seq_id: int
    request: int  # sequences with one number came together
    num_prompt: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Abort:
    """Nobody waits for these sequences any more."""

    at: float
    seq_ids: tuple[int, ...]


@dataclass(slots=True)
class Step:
    """A step that is over. Not ``frozen``, as one is made for each step."""

    number: int
    planned_at: float  # seconds, monotonic
    at: float  # when its result was taken in
    num_tokens: int
    rows: tuple[int, ...]  # the sequences that sampled
    work: tuple[Work, ...]
    new: tuple[tuple[int, int], ...]  # sequence id, tokens found in the prefix cache
    left: tuple[int, ...]  # sequences that runners forgot: over, or preempted
    finished: Endings
    stats: StepStats
    failure: str = ""  # why it came to nothing, if it did
    not_started: NotStarted = ()  # with it


Event = Arrival | Abort | Step


class Recorder:
    """The latest events, as many as fit into ``max_bytes`` by estimate."""

    def __init__(self, max_bytes: int = 8 << 20) -> None:
        self._max_bytes = max_bytes
        self._events: deque[tuple[Event, int]] = deque()
        self._num_bytes = 0
        self._num_dropped = 0
        self._requests = count()

    @property
    def end(self) -> int:
        """The number that the next event gets; events are counted from 0."""
        return self._num_dropped + len(self._events)

    def since(self, number: int) -> list[Event]:
        """The events from that number on, as far as they are still here."""
        latest = islice(reversed(self._events), max(self.end - number, 0))
        return [event for event, _ in latest][::-1]

    def arrived(self, at: float, seq_ids: Sequence[int], num_prompt: int, max_tokens: int) -> None:
        """Sequences of one prompt began to wait."""
        request = next(self._requests)
        for seq_id in seq_ids:
            self._add(Arrival(at, seq_id, request, num_prompt, max_tokens), STEP_BYTES // 4)

    def aborted(self, at: float, seq_ids: Iterable[int]) -> None:
        """Sequences were dropped."""
        if ids := tuple(seq_ids):
            self._add(Abort(at, ids), STEP_BYTES // 4 + ROW_BYTES * len(ids))

    def stepped(
        self,
        plan: Plan,
        planned_at: float,
        at: float,
        stats: StepStats,
        work: Iterable[Work] = (),
        finished: Endings = (),
        failure: str = "",
        not_started: NotStarted = (),
    ) -> None:
        """A step's result was taken in."""
        step = Step(
            number=plan.step,
            planned_at=planned_at,
            at=at,
            num_tokens=plan.num_tokens,
            rows=plan.rows,
            work=tuple(work),
            new=tuple([(seq.seq_id, len(seq.prefix)) for seq in plan.new]),
            left=plan.ended,
            finished=finished,
            stats=stats,
            failure=failure,
            not_started=not_started,
        )
        details = len(step.work) + len(not_started)
        self._add(step, STEP_BYTES + ROW_BYTES * len(step.rows) + CHUNK_BYTES * details)

    def _add(self, event: Event, num_bytes: int) -> None:
        self._events.append((event, num_bytes))
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._events.popleft()[1]
            self._num_dropped += 1
