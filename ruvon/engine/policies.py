"""Who may join the running sequences, how many at a time, and in which order.

A policy is one function of three numbers. Adding one means writing it and its row in `POLICIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from types import MappingProxyType
from typing import TypeAlias

from ruvon.engine.types import Sequence

Policy: TypeAlias = Callable[[int, int, int], int]
"""(number waiting, number running, most that may run) → how many may join now."""

NOBODY: Mapping[str, float] = MappingProxyType({})

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


@dataclass(frozen=True, slots=True)
class Order:
    """Which sequence goes first: by rank, or, where it is ``fair``, that of the tenant that has
    been served the least, and of one tenant's by rank."""

    rank: Callable[[Sequence], Rank]
    fair: bool = False


ORDERS: Mapping[str, Order] = {
    "fair": Order(by_arrival, fair=True),
    "fcfs": Order(by_arrival),
    "priority": Order(by_priority),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may hold, and who decides about it."""

    max_seqs: int
    max_tokens: int
    policy: Policy
    order: Order
    chunked: bool = True  # off: a prompt is computed in one step, if one can hold it
    caching: bool = True  # look up and publish prefixes
    stages: int = 1  # that a step goes through; if several, no token of it is known before it ends


class Shares:
    """What each tenant has been served: tokens, divided by its weight.

    Only differences count. Who comes, or comes back, starts at the least that one of the others has
    been served: nobody can save up. Once nobody is left, all is forgotten.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._live: dict[str, int] = {}  # sequences
        self._weights: dict[str, float] = {}  # of those who have some

    @property
    def contended(self) -> bool:
        """Whether several tenants are there."""
        return len(self._live) > 1

    def enter(self, seq: Sequence) -> None:
        """One more sequence is there."""
        tenant = seq.tenant
        if tenant not in self._live:
            least = min((self._served[other] for other in self._live), default=0.0)
            self._served[tenant] = max(self._served.get(tenant, 0.0), least)
            self._live[tenant] = 0
        self._live[tenant] += 1
        self._weights[tenant] = seq.weight

    def leave(self, seq: Sequence) -> None:
        """A sequence is over."""
        self._live[seq.tenant] -= 1
        if not self._live[seq.tenant]:
            del self._live[seq.tenant], self._weights[seq.tenant]
        if not self._live:
            self._served.clear()

    def charge(self, seq: Sequence, num_tokens: int) -> None:
        """The last so many of a sequence's computed tokens are new, but for those that it already
        had before it was preempted."""
        num_new = min(num_tokens, seq.num_computed - seq.num_served)
        if num_new > 0:
            self._served[seq.tenant] += num_new / seq.weight

    def served(self, tenant: str) -> float:
        """What a tenant that is there has been served."""
        return self._served[tenant]

    def snapshot(self) -> dict[str, float]:
        """The same of all."""
        return {tenant: self._served[tenant] for tenant in self._live}

    def state(self) -> dict[str, float]:
        """What it has of all, those included who are away."""
        return dict(self._served)

    def restore(self, served: Mapping[str, float], sequences: Iterable[Sequence]) -> None:
        """Have served so much, when these sequences are there."""
        for seq in sequences:
            self.enter(seq)
        self._served = dict(served)

    def live(self, tenant: str) -> int:
        """Its sequences that wait or run."""
        return self._live.get(tenant, 0)

    def of(self, amount: float, tenant: str, weight: float) -> float:
        """A tenant's share of something, among those that are there and itself."""
        others = sum(self._weights.values()) - self._weights.get(tenant, 0.0)
        return amount * weight / (others + weight)


class WaitingQueue:
    """Waiting sequences: a line for each tenant, by rank. A preempted one comes back to its place.

    A line is a heap whose removed entries stay until they surface or outnumber the rest, so that
    every verb costs O(log n) at most, and one more for each tenant.
    """

    def __init__(self, rank: Callable[[Sequence], Rank]) -> None:
        self._rank = rank
        self._tokens: dict[str, int] = {}  # of each line
        self._lines: dict[str, list[tuple[Rank, Sequence]]] = {}  # heaps
        self._members: dict[str, dict[int, Sequence]] = {}  # of each line, by id
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def ids(self) -> list[int]:
        """All that wait, in no order."""
        return [seq_id for members in self._members.values() for seq_id in members]

    @property
    def num_tokens(self) -> int:
        """Of all that wait."""
        return sum(self._tokens.values())

    def tokens_of(self, tenant: str) -> int:
        """Of a tenant's sequences that wait."""
        return self._tokens.get(tenant, 0)

    def __contains__(self, seq: Sequence) -> bool:
        return seq.id in self._members.get(seq.tenant, ())

    def push(self, seq: Sequence) -> None:
        """Add a sequence that is not in the queue."""
        self._members.setdefault(seq.tenant, {})[seq.id] = seq
        heappush(self._lines.setdefault(seq.tenant, []), (self._rank(seq), seq))
        self._size += 1
        self._tokens[seq.tenant] = self.tokens_of(seq.tenant) + len(seq.tokens)

    def first(self, served: Mapping[str, float] = NOBODY) -> Sequence:
        """The next: of all lines' first ones the one whose tenant has been ``served`` the least,
        and of such the first by rank. The queue must not be empty."""
        heads = [(served.get(tenant, 0.0), *line[0]) for tenant, line in self._lines.items()]
        return min(heads)[2] if len(heads) > 1 else heads[0][2]

    def remove(self, seq: Sequence) -> None:
        """Take a sequence out, wherever it stands."""
        line, members = self._lines[seq.tenant], self._members[seq.tenant]
        del members[seq.id]
        self._size -= 1
        self._tokens[seq.tenant] -= len(seq.tokens)
        if not members:
            del self._lines[seq.tenant], self._members[seq.tenant], self._tokens[seq.tenant]
            return
        while line[0][1].id not in members:
            heappop(line)
        if len(line) > 2 * len(members) + 64:
            line[:] = [entry for entry in line if entry[1].id in members]
            heapify(line)

    def place(self, seq: Sequence, fair: bool) -> int:
        """How many are before a waiting sequence. Where it is ``fair``, about so many: of other
        tenants' as many as its own has before it, if there are so many."""
        own = self._rank(seq)
        before = {
            tenant: sum(self._rank(other) < own for other in members.values())
            for tenant, members in self._members.items()
        }
        if not fair:
            return sum(before.values())
        ahead = before[seq.tenant]
        return ahead + sum(
            min(len(members), ahead + 1)
            for tenant, members in self._members.items()
            if tenant != seq.tenant
        )
