"""OpenRequests: the sequences whose end somebody waits for, and what is measured of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ruvon.engine.drain_rate import DrainRate
from ruvon.engine.draw import INFINITE, NOT_A_NUMBER
from ruvon.engine.pooling import BROKEN
from ruvon.engine.stream import Stream
from ruvon.engine.types import Emission, Sequence
from ruvon.telemetry.finished import Finished

CORRUPTED = frozenset({NOT_A_NUMBER, INFINITE, BROKEN})
"""Errors of sequences for which the device computed what are no numbers."""


class LoopMetrics(Protocol):
    """What the loop reports; `ruvon.telemetry.Metrics` for a server, a recorder in tests.

    All times are in seconds.
    """

    def record_step(
        self,
        *,
        num_tokens: int,
        num_running: int,
        num_waiting: int,
        kv_usage: float,
        num_cached: int,
        num_queried: int,
        num_preempted: int,
    ) -> None: ...

    def record_prompt(self, num_prompt: int, num_cached: int) -> None: ...

    def record_first_token(self, seconds: float) -> None: ...

    def record_inter_token(self, seconds: float, count: int) -> None: ...

    def record_finished(self, finished: Finished) -> None: ...


@dataclass(slots=True)
class RequestState:
    """Where one sequence's emissions go, and when they came."""

    seq: Sequence
    stream: Stream
    n: int
    first_token_at: float | None = None
    token_at: float = 0.0  # the latest


class OpenRequests:
    """States of sequences by id. Times are the loop's, in seconds."""

    def __init__(self, metrics: LoopMetrics) -> None:
        self._metrics = metrics
        self._states: dict[int, RequestState] = {}
        self._intervals: Counter[tuple[float, int]] = Counter()
        self.drain = DrainRate()

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[int]:
        return iter(self._states)

    def streams(self) -> list[Stream]:
        """Each that waits for one sequence or more, once."""
        return list({id(state.stream): state.stream for state in self._states.values()}.values())

    def sequences(self, seq_ids: Iterable[int] | None = None) -> list[Sequence]:
        """Those of ``seq_ids``, of all if there are none given."""
        ids = self._states if seq_ids is None else seq_ids
        return [self._states[seq_id].seq for seq_id in ids]

    def open(self, seq: Sequence, stream: Stream, n: int) -> None:
        """``seq``, one of its job's ``n``, has been queued."""
        self._states[seq.id] = RequestState(seq, stream, n)
        stream.open.add(seq.id)

    def take(self, emission: Emission, now: float) -> tuple[Stream, bool]:
        """Measure an emission; its stream, and whether its reader should hear of it at once."""
        state = self._states[emission.seq_id]
        urgent = emission.finish is not None
        if emission.tokens:
            if state.first_token_at is None:
                urgent = True
                state.first_token_at = now
                self._metrics.record_prompt(state.seq.num_prompt, state.seq.num_cached)
                self._metrics.record_first_token(now - state.seq.arrived_at)
            else:
                self._intervals[state.token_at, len(emission.tokens)] += 1
            state.token_at = now
        if emission.finish is not None:
            if emission.finish == "length" and state.first_token_at is None:  # scored only
                self._metrics.record_prompt(state.seq.num_prompt, state.seq.num_cached)
            self._close(emission.seq_id, emission.finish, now, emission.error)
        return state.stream, urgent

    def end_step(self, now: float) -> None:
        """All of a step's emissions have been taken: its tokens share their time."""
        for (since, num_tokens), num in self._intervals.items():
            self._metrics.record_inter_token((now - since) / num_tokens, num * num_tokens)
        self._intervals.clear()

    def close(self, seq_id: int, reason: str, now: float) -> None:
        """Nothing more will come of an unfinished sequence."""
        self._close(seq_id, reason, now).stream.open.discard(seq_id)

    def clear(self) -> None:
        """Forget them all; somebody has told their streams."""
        self._states.clear()

    def _close(
        self, seq_id: int, reason: str, now: float, error: str | None = None
    ) -> RequestState:
        """Called once for each sequence; a phase it never reached lasts 0 seconds."""
        state = self._states.pop(seq_id)
        seq = state.seq
        self.drain.note(seq, now)
        scheduled_at = now if seq.scheduled_at is None else seq.scheduled_at
        first_token_at = now if state.first_token_at is None else state.first_token_at
        finished = Finished(
            reason=reason,
            num_prompt=seq.num_prompt,
            num_output=seq.num_output,
            num_cached=seq.num_cached,
            max_tokens=seq.max_tokens,
            n=state.n,
            arrived_at=seq.arrived_at,
            queue=scheduled_at - seq.arrived_at,
            prefill=first_token_at - scheduled_at,
            decode=now - first_token_at,
            num_before=seq.wait.num_before,
            waits=seq.wait.seconds,
            num_chunks=seq.num_chunks,
            num_preempted=seq.num_preempted,
            corrupted=error in CORRUPTED,
        )
        state.stream.finished.append(finished)
        self._metrics.record_finished(finished)
        return state
