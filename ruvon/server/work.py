"""What requests have given the engine, and how that went: for their log lines, and for who asks
later. What is remembered is bounded, and each tenant finds its own only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from ruvon.engine.stream import Stream
from ruvon.engine.types import Job
from ruvon.telemetry.finished import Finished, last_of

MOST_COMPLETIONS = 4096  # remembered: 8 MB where each is a request of its own


@dataclass(slots=True)
class Work:
    """Of one request. ``job`` is its first."""

    job: Job
    streams: list[Stream] = field(default_factory=list)

    @property
    def finished(self) -> Finished | None:
        """The completion that it waited for last, as far as some are over."""
        return last_of(ended for stream in self.streams for ended in stream.finished)


WORK = web.RequestKey("work", Work)


def times(last: Finished | None) -> dict[str, Any]:
    """What log lines say of the completion that ended last: nothing of none."""
    if last is None:
        return {}
    facts: dict[str, Any] = {
        "queue_ms": round(1000 * last.queue, 1),
        "prefill_ms": round(1000 * last.prefill, 1),
        "decode_ms": round(1000 * last.decode, 1),
        "finish": last.reason,
    }
    reason = max(last.waits, key=last.waits.__getitem__, default="step")
    if reason != "step":  # as whoever comes does
        facts["waited_for"] = reason
    if last.num_preempted:
        facts["preempted"] = last.num_preempted
    return facts


@dataclass(slots=True)
class Remembered:
    """A request that runs or is over."""

    tenant: str
    streams: list[Stream]
    came_at: float  # seconds, monotonic
    names: set[str] = field(default_factory=set)
    size: int = 0  # completions


class Requests:
    """The latest requests, by tenant and any of their names."""

    def __init__(self, most: int = MOST_COMPLETIONS) -> None:
        self._most = most
        self._size = 0
        self._order: deque[Remembered] = deque()
        self._named: dict[tuple[str, str], Remembered] = {}

    def remember(self, tenant: str, names: Iterable[str], streams: list[Stream]) -> None:
        """A request has queued the last of its ``streams``. What it is called was a client's
        choice: the latest of a name counts."""
        names = [name for name in names if name]
        entry = self._named.get((tenant, names[0]))
        if entry is None or entry.streams is not streams:
            entry = Remembered(tenant, streams, time.monotonic())
            self._order.append(entry)
        entry.names.update(names)
        self._named.update({(tenant, name): entry for name in names})
        num_new = len(streams[-1].open)
        entry.size += num_new
        self._size += num_new
        while self._size > self._most and len(self._order) > 1:
            self._forget(self._order.popleft())

    def _forget(self, entry: Remembered) -> None:
        self._size -= entry.size
        for name in entry.names:
            if self._named.get((entry.tenant, name)) is entry:
                del self._named[entry.tenant, name]

    def find(self, name: str, tenant: str | None) -> Remembered | None:
        """A tenant's request, or with None anybody's, the latest first."""
        if tenant is not None:
            return self._named.get((tenant, name))
        return next((entry for entry in reversed(self._order) if name in entry.names), None)


REQUESTS = web.AppKey("requests", Requests)
