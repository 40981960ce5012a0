"""Who may join the running sequences, how many at a time, and in which order.

A policy is one function of three numbers. Adding one means writing it and its row in `POLICIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from typing import TypeAlias

from ruvon.engine.types import Sequence

Policy: TypeAlias = Callable[[int, int, int], int]
"""(number waiting, number running, most that may run) → how many may join now."""

Rank: TypeAlias = tuple[int, int]
"""Sorts sequences: the smaller goes first. Ends in the id, so no two are equal."""


def sequential(waiting: int, running: int, max_seqs: int) -> int:
    """One sequence at a time: the baseline that batching is measured against."""
    return 0 if running else min(waiting, 1)


def static(waiting: int, running: int, max_seqs: int) -> int:
    """A batch at a time: the next one forms when the last sequence of this one is done."""
    return 0 if running else min(waiting, max_seqs)


def continuous(waiting: int, running: int, max_seqs: int) -> int:
    """Every free place is filled at the next step."""
    return min(waiting, max_seqs - running)


POLICIES: Mapping[str, Policy] = {
    "continuous": continuous,
    "sequential": sequential,
    "static": static,
}


def by_arrival(seq: Sequence) -> Rank:
    """First come, first served: ids count up."""
    return (0, seq.id)


def by_priority(seq: Sequence) -> Rank:
    """The lowest priority number first; equals in order of arrival."""
    return (seq.priority, seq.id)


ORDERS: Mapping[str, Callable[[Sequence], Rank]] = {
    "fcfs": by_arrival,
    "priority": by_priority,
}


class WaitingQueue:
    """Waiting sequences, first by rank. A preempted one comes back to its old place.

    A heap whose removed entries stay until they surface or outnumber the rest, so that every
    verb costs O(log n) at most.
    """

    def __init__(self, order: Callable[[Sequence], Rank]) -> None:
        self._order = order
        self._heap: list[tuple[Rank, Sequence]] = []
        self._members: dict[int, Sequence] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, seq: Sequence) -> bool:
        return seq.id in self._members

    def push(self, seq: Sequence) -> None:
        """Add a sequence that is not in the queue."""
        self._members[seq.id] = seq
        heappush(self._heap, (self._order(seq), seq))

    def first(self) -> Sequence:
        """The next in line; the queue must not be empty."""
        while self._heap[0][1].id not in self._members:
            heappop(self._heap)
        return self._heap[0][1]

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        del self._members[seq.id]
        if self._heap[0][1] is seq:
            heappop(self._heap)
        elif len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [entry for entry in self._heap if entry[1].id in self._members]
            heapify(self._heap)
