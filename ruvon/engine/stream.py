"""Stream: one request's news on their way from the engine's loop to a reader.

A stream gathers what has arrived since its reader last asked, so a slow reader gets larger pieces
and stalls nobody; what it gathers is bounded by the tokens it asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from ruvon.engine.types import Emission
from ruvon.errors import UnavailableError
from ruvon.telemetry.finished import Finished


class Stream:
    """News of one request's sequences: an async iterator of lists of emissions.

    Ends when all sequences have finished. Leave it early through ``aclose`` (use
    ``contextlib.aclosing``): that aborts what is unfinished. One reader at a time.
    """

    def __init__(self, end: Callable[[Stream, Iterable[int], str], None], number: int = 0) -> None:
        """``number`` spreads streams over the steps at which they wake."""
        self.number = number
        self.open: set[int] = set()  # ids of the unfinished sequences
        self.finished: list[Finished] = []
        self.queued = False  # for a later wake, see `ruvon.engine.coalescing`
        self._end = end
        self._news: list[Emission] = []
        self._error: UnavailableError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[Emission]:
        """All emissions since the last call, at least one. Raises the engine's error if it died."""
        while not self._news:
            if self._error is not None:
                raise self._error
            if not self.open:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        news, self._news = self._news, []
        return news

    def stop(self, seq_id: int) -> None:
        """End one sequence as finished, for its reader found a stop string; the others go on."""
        if seq_id in self.open:
            self._end(self, [seq_id], "stop")

    async def aclose(self) -> None:
        """Abort what has not finished; what has arrived is dropped. Safe to call twice."""
        self._end(self, list(self.open), "abort")
        self._news.clear()
        self._error = None  # it may hold on to what was asked
        if self._timer is not None:
            self._timer.cancel()
        self.wake()

    def expire(self, seconds: float, error: Callable[[], UnavailableError]) -> None:
        """End with an error what is not over in so many seconds."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire, error)

    def _expire(self, error: Callable[[], UnavailableError]) -> None:
        if self.open:
            told = error()
            self._end(self, list(self.open), "deadline")
            self.fail(told)

    def put(self, emission: Emission) -> None:
        """Take news in; the reader hears of it when somebody calls `wake`."""
        self._news.append(emission)
        if emission.finish is not None:
            self.open.discard(emission.seq_id)

    def fail(self, error: UnavailableError) -> None:
        """End with an error, after the news that has already arrived."""
        self._error = error
        self.open.clear()
        self.wake()

    def wake(self) -> None:
        """Let the reader, if one waits, look for news."""
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
