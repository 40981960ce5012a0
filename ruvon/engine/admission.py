"""Admission: when new requests may be read while steps run.

Reading as many new requests as a fast device has room for takes longer than a step. So arrivals
come in a few between two steps, which keep the device busy.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

MOST_ARRIVALS = 16  # between two steps; reading one takes a millisecond


class Admission:
    """Lets arrivals in: at once, unless a step is over that nobody has taken in yet. Then they
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

    def admit(self, most: int) -> None:
        """Let up to ``most`` in."""
        while self._waiting and most:
            turn = self._waiting.popleft()
            if not turn.done():  # its client may have left
                turn.set_result(None)
                most -= 1

    def admit_all(self) -> None:
        self.admit(len(self._waiting))

    def admit_meanwhile(self) -> None:
        """Let one in after the other until a step is over."""
        if self._waiting and not self._behind():
            self.admit(1)
            asyncio.get_running_loop().call_soon(self.admit_meanwhile)
