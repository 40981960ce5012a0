"""Stream: one request's news on their way from the engine's loop to a reader; Wakes: when it hears.

A stream gathers what has arrived since its reader last asked, so a slow reader gets larger pieces
and stalls nobody; what it gathers is bounded by the tokens it asked for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from ruvon.engine.types import Emission, FinishReason
from ruvon.errors import UnavailableError

MOST_STEPS = 4  # whose news a stream may gather before its reader hears of them


class Stream:
    """News of one request's sequences: an async iterator of lists of emissions.

    Ends when all sequences have finished. Leave it early through ``aclose`` (use
    ``contextlib.aclosing``): that aborts what is unfinished. One reader at a time.
    """

    def __init__(
        self, end: Callable[[Stream, Iterable[int], FinishReason], None], number: int = 0
    ) -> None:
        """``number`` spreads streams over the steps at which they wake."""
        self.number = number
        self.open: set[int] = set()  # ids of the unfinished sequences
        self.listed = False  # for a later wake, see `Wakes`
        self._end = end
        self._news: list[Emission] = []
        self._error: UnavailableError | None = None
        self._reader: asyncio.Future[None] | None = None

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
        self.wake()

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


class Wakes:
    """Decides when readers hear of their streams' news: once a step at most, and at once as long as
    the event loop keeps up with the steps.

    Where it is behind, what costs most is not the steps but a write to a socket for each reader and
    step. Then readers take turns: each is woken every few steps and writes several tokens at once.
    First tokens and ends are urgent, and go out at once.
    """

    def __init__(self) -> None:
        self._spread = 1  # steps from one wake of a stream to the next
        self._step = 0
        self._urgent: list[Stream] = []
        self._due: deque[list[Stream]] = deque([] for _ in range(MOST_STEPS))  # by steps to go

    def begin_step(self, behind: bool) -> None:
        """``behind``: the step was over before anybody asked for it."""
        self._step += 1
        self._spread = min(self._spread + 1, MOST_STEPS) if behind else max(self._spread - 1, 1)

    def add(self, stream: Stream, urgent: bool) -> None:
        """The stream has news of this step."""
        if urgent:
            self._urgent.append(stream)
        elif not stream.listed:
            stream.listed = True
            self._due[(stream.number - self._step) % self._spread].append(stream)

    def end_step(self) -> None:
        """Wake those whose turn it is."""
        for stream in self._urgent:
            stream.wake()
        self._urgent.clear()
        due = self._due.popleft()
        self._due.append([])
        for stream in due:
            stream.listed = False
            stream.wake()
