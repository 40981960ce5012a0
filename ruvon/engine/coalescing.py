"""Output coalescing: when readers hear of their streams' news.

On a fast device a step takes less time than writing its tokens to hundreds of sockets. Steps go
first, for they keep the device busy, and readers then hear of several steps at once.
"""

from __future__ import annotations

from collections import deque

from ruvon.engine.stream import Stream

MOST_STEPS = 4  # whose news a stream may gather before its reader hears of them
FEW_READERS = 8  # to whom writing takes less time than a step; for each so many, a step more


class Coalescer:
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
        elif not stream.queued:
            stream.queued = True
            self._due[(stream.number - self._step) % self._spread].append(stream)

    def end_step(self) -> None:
        """Wake those whose turn it is."""
        for stream in self._urgent:
            stream.wake()
        self._urgent.clear()
        due = self._due.popleft()
        self._due.append([])
        for stream in due:
            stream.queued = False
            stream.wake()
