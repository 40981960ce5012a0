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
    wait, in a line for each tenant, and the lines take turns. A few come in after each step, and
    others one by one while none is over."""

    def __init__(self, behind: Callable[[], bool]) -> None:
        """``behind``: whether a step that is over waits to be taken in."""
        self._behind = behind
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}  # the next one's first

    @property
    def num_waiting(self) -> int:
        """In all lines."""
        return sum(map(len, self._lines.values()))

    async def enter(self, tenant: str = "") -> None:
        """Wait for one's turn."""
        if self._lines or self._behind():
            turn = asyncio.get_running_loop().create_future()
            self._lines.setdefault(tenant, deque()).append(turn)
            await turn

    def admit(self, most: int) -> None:
        """Let up to ``most`` in."""
        while self._lines and most:
            tenant = next(iter(self._lines))
            line = self._lines.pop(tenant)
            turn = line.popleft()
            if line:
                self._lines[tenant] = line  # behind all others
            if not turn.done():  # its client may have left
                turn.set_result(None)
                most -= 1

    def admit_all(self) -> None:
        self.admit(self.num_waiting)

    def admit_meanwhile(self) -> None:
        """Let one in after the other until a step is over."""
        if self._lines and not self._behind():
            self.admit(1)
            asyncio.get_running_loop().call_soon(self.admit_meanwhile)
