"""Which replica a request goes to: a pure function of what is known of them.

The one with the longest match, so that its cache saves the most, unless it has more to do than the
least loaded by more than a bound: then waiting would cost more than computing again. Among equals
the one that has the client's session, then the least loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from ruvon.router.prefixes import Prefixes


class Candidate(Protocol):
    """What is known of a replica."""

    @property
    def load(self) -> int:
        """Requests that it has and that have not ended."""

    @property
    def prefixes(self) -> Prefixes: ...


C = TypeVar("C", bound=Candidate)


def choose(
    candidates: Iterable[C],
    keys: Sequence[bytes],
    bound: int,
    session: C | None = None,
    turn: int = 0,
) -> tuple[C, int, str] | None:
    """A replica, how many of the ``keys`` it holds, and why it: ``prefix``, ``session`` or
    ``load``. None without candidates. Those with equally little to do take turns, by ``turn``."""
    everyone = list(candidates)
    if not everyone:
        return None
    least = min(replica.load for replica in everyone)
    near = [replica for replica in everyone if replica.load <= least + bound]
    first = turn % len(near)
    near = near[first:] + near[:first]
    ranked = [(replica.prefixes.match(keys), replica is session, -replica.load) for replica in near]
    best = max(range(len(near)), key=ranked.__getitem__)
    matched, is_session, _ = ranked[best]
    reason = "prefix" if matched else "session" if is_session else "load"
    return near[best], matched, reason
