"""All replicas of one router, and what it remembers of who has what."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from hashlib import blake2b
from itertools import count
from typing import TypeAlias

import structlog
from aiohttp import web

from ruvon.config import parse_size
from ruvon.config.router import RouterConfig
from ruvon.errors import ShuttingDownError
from ruvon.router.choice import choose
from ruvon.router.prefixes import ENTRY_BYTES, Prefixes
from ruvon.router.prompt import Prompt
from ruvon.router.replica import Replica, poll

log = structlog.get_logger(__name__)

Told: TypeAlias = Callable[[Replica], None]

MOST_REMEMBERED = 100_000  # sessions, and ids of responses and streams
MOST_MISSED = 3  # polls in a row, before a replica counts as gone


class Remembered:
    """Who has what, by a digest of its id, of which a client may send 8 KiB. What was used longest
    ago is forgotten first."""

    def __init__(self, most: int = MOST_REMEMBERED) -> None:
        self._most = most
        self._replicas: OrderedDict[bytes, Replica] = OrderedDict()

    def note(self, name: str, replica: Replica) -> None:
        digest = digest_of(name)
        self._replicas[digest] = replica
        self._replicas.move_to_end(digest)
        if len(self._replicas) > self._most:
            self._replicas.popitem(last=False)

    def find(self, name: str | None) -> Replica | None:
        return None if name is None else self._replicas.get(digest_of(name))

    def forget(self, replica: Replica) -> None:
        """Of one that is gone for good."""
        gone = [digest for digest, holder in self._replicas.items() if holder is replica]
        for digest in gone:
            del self._replicas[digest]


def digest_of(name: str) -> bytes:
    return blake2b(name.encode(errors="surrogatepass"), digest_size=16).digest()


class Fleet:
    """The replicas, and which of them gets a request."""

    def __init__(self, config: RouterConfig, urls: Iterable[str] = ()) -> None:
        self.config = config
        self.replicas: list[Replica] = []
        self.holders = Remembered()  # of stored responses and of streams that can be gone on with
        self.sessions = Remembered()
        self.draining = False  # all of it: the router ends
        self._turns = count()
        self._names = count()
        for url in urls:
            self.add(url)

    def add(self, url: str) -> Replica:
        """One more; it gets requests once a poll has found it ready. Without ``url``, it is not
        known yet where it will be."""
        limit = parse_size(self.config.prefix_memory) // ENTRY_BYTES
        replica = Replica(str(next(self._names)), url, Prefixes(max(limit, 1)))
        self.replicas.append(replica)
        return replica

    def remove(self, replica: Replica) -> None:
        """It is gone, and will not come back."""
        replica.lose()
        self.replicas.remove(replica)
        self.holders.forget(replica)
        self.sessions.forget(replica)

    @property
    def in_flight(self) -> int:
        """Requests that have not been answered to their end."""
        return sum(replica.in_flight for replica in self.replicas)

    @property
    def num_open(self) -> int:
        """Replicas that take requests."""
        return sum(replica.open for replica in self.replicas)

    def check_open(self) -> None:
        """Raises ShuttingDownError where no new request is wanted."""
        if self.draining:
            raise ShuttingDownError("The router is shutting down.", retry_after=5.0)

    def choose(
        self, prompt: Prompt, session: str | None, tried: Collection[Replica]
    ) -> tuple[Replica, int, str] | None:
        """Who gets a request next, how many of its keys that replica holds, and why it; None where
        all have been ``tried``. What only one replica has is looked for where it was last seen,
        even if that one is being drained, and if nobody knows, everywhere."""
        left = [replica for replica in self.replicas if replica not in tried]
        if prompt.held is not None:
            holder = self.holders.find(prompt.held)
            if holder in left and holder.status in ("ready", "draining"):
                return holder, holder.prefixes.match(prompt.keys), "held"
            left = [replica for replica in left if replica.status in ("ready", "draining")]
        else:
            left = [replica for replica in left if replica.open]
        bound, asked = self.config.max_imbalance, self.sessions.find(session)
        chosen = choose(left, prompt.keys, bound, asked, next(self._turns))
        if chosen is not None:
            chosen[0].prefixes.hold(prompt.keys)
            if session is not None:
                self.sessions.note(session, chosen[0])
        return chosen


async def watch(fleet: Fleet, key: str | None, changed: Told, heard: Told) -> None:
    """Look at every replica again and again. ``key`` is for their questions, ``changed`` is told of
    one whose status is another than before, ``heard`` of each that was looked at."""
    tasks: dict[Replica, asyncio.Task[None]] = {}
    try:
        while True:
            placed = [replica for replica in fleet.replicas if replica.url]
            for replica in placed:
                if replica not in tasks or tasks[replica].done():
                    tasks[replica] = asyncio.create_task(look(replica, key, changed, heard))
            tasks = {replica: tasks[replica] for replica in placed}
            await asyncio.sleep(fleet.config.poll_interval)
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)


async def look(replica: Replica, key: str | None, changed: Told, heard: Told) -> None:
    """One poll, and what follows from it."""
    before = replica.status
    await poll(replica, key)
    heard(replica)
    if replica.num_missed >= MOST_MISSED and replica.status not in ("starting", "down"):
        replica.lose()
    if replica.status != before:
        log.info("replica", name=replica.name, url=replica.url, status=replica.status)
        changed(replica)


FLEET = web.AppKey("fleet", Fleet)
