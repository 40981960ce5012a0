"""Ranks whose processes are threads of this one: what is sent is real, what computes is not."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Queue
from threading import Thread

from fakes import FakeRunner

from ruvon.engine.ranks.channel import Channel, Kind
from ruvon.engine.ranks.meeting import MeetingCounter
from ruvon.engine.ranks.rank import Rank
from ruvon.engine.ranks.ring import PlanRing, RingReader
from ruvon.engine.ranks.runner import Ranks
from ruvon.grammars import Grammar


class ThreadRank:
    """A rank in a thread, in place of a `RankProcess`."""

    def __init__(self, rank: int, runner: FakeRunner, ring: PlanRing, *, answers: bool) -> None:
        self.rank, self.name = rank, f"rank {rank}"
        ours, theirs = socket.socketpair()
        self.channel, self.other_end = Channel(ours), Channel(theirs, rank)
        self.ranks = range(rank, rank + 1)
        self._socket, self._other_socket = ours, theirs
        reader = RingReader(ring.fd, rank)
        self.compiled: Queue[Grammar] = Queue()
        compile = self.compiled.put
        self._serves = Rank(
            self.other_end, reader, runner, MeetingCounter(), answers=answers, compile=compile
        )
        self._thread = Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with suppress(EOFError, OSError):
            self._serves.serve()
        self.kill()

    def send(self, kind: Kind, payload: bytes = b"", *, rank: int = 0) -> None:
        with suppress(OSError):
            self.channel.send(kind, payload, rank=rank)

    def kill(self) -> None:
        for end in (self._socket, self._other_socket):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def fate(self) -> str:
        return "was killed"

    def end(self, patience: float) -> None:
        self._thread.join(patience or 1)

    def close(self) -> None:
        self.channel.close()
        self.other_end.close()


@contextmanager
def thread_ranks(
    make_runner: Callable[[int], FakeRunner], count: int = 2, size: int | None = None, **ring: int
) -> Iterator[tuple[Ranks, list[ThreadRank]]]:
    """``count`` ranks, ``size`` of them a stage; ``make_runner`` makes each one's."""
    size = size or count
    shared, runners = PlanRing(count, **ring), [make_runner(rank) for rank in range(count)]
    threads = [
        ThreadRank(rank, runner, shared, answers=rank == count - size)
        for rank, runner in enumerate(runners)
    ]
    said = {name: getattr(runners[0], name) for name in ("depth", "grammar_depth", "long_step")}
    ranks = Ranks(threads, shared, size, [said] * count)
    try:
        yield ranks, threads
    finally:
        ranks.close()
