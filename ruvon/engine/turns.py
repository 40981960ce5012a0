"""Who gets the event loop when steps, readers and newcomers all want it.

On a fast device a step takes less time than writing its tokens to hundreds of sockets, and reading
as many new requests takes longer still. Steps go first, for they keep the device busy: readers then
hear of several steps at once (`Wakes`), and newcomers come in a few between two steps (`Gate`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from ruvon.engine.stream import Stream

MOST_STEPS = 4  # whose news a stream may gather before its reader hears of them
FEW_READERS = 8  # to whom writing takes less time than a step; for each so many, a step more
MOST_NEWCOMERS = 16  # between two steps; reading one takes a millisecond


class Wakes:
    """Decides when readers hear of their streams' news: once a step at most, and at once as long as
    the event loop keeps up with the steps.

    Where it is behind and readers are many, what costs most is not the steps but a write to a
    socket for each reader and step. Then readers take turns: each is woken every few steps and
    writes several tokens at once. First tokens and ends are urgent, and go out at once.
    """

    def __init__(self) -> None:
        self._spread = 1  # steps from one wake of a stream to the next
        self._step = 0
        self._urgent: list[Stream] = []
        self._due: deque[list[Stream]] = deque([] for _ in range(MOST_STEPS))  # by steps to go

    def begin_step(self, behind: bool, num_readers: int) -> None:
        """``behind``: the step was over before the readers of the one before were through."""
        self._step += 1
        most = min(num_readers // FEW_READERS, MOST_STEPS) if behind else self._spread - 1
        self._spread = max(min(self._spread + 1, most), 1)

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


class Gate:
    """Lets newcomers in: at once, unless a step is over that nobody has taken in yet. Then they
    wait, first come first served. A few come in after each step, and others one by one while none
    is over."""

    def __init__(self, behind: Callable[[], bool]) -> None:
        """``behind``: whether a step that is over waits to be taken in."""
        self._behind = behind
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        """Wait for one's turn."""
        if self._waiting or self._behind():
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn

    def open(self, most: int) -> None:
        """Let up to ``most`` in."""
        while self._waiting and most:
            turn = self._waiting.popleft()
            if not turn.done():  # its client may have left
                turn.set_result(None)
                most -= 1

    def open_all(self) -> None:
        self.open(len(self._waiting))

    def open_meanwhile(self) -> None:
        """Let one in after the other until a step is over."""
        if self._waiting and not self._behind():
            self.open(1)
            asyncio.get_running_loop().call_soon(self.open_meanwhile)
