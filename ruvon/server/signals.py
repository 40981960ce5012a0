"""Signals that end a server, or a router before servers."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Callable

SAME_SIGNAL = 0.3  # seconds in which another signal is no second one


def watch_end(
    is_ending: Callable[[], bool],
    begin: Callable[[signal.Signals], None],
    end: Callable[[signal.Signals], None],
) -> None:
    """The first SIGTERM or SIGINT is to ``begin`` the end, the second to ``end`` at once.

    What comes within `SAME_SIGNAL` of the first is the first again: `timeout` sends its signal to
    the process and then to its whole group.
    """
    loop = asyncio.get_running_loop()
    came_at = math.inf

    def on_signal(number: signal.Signals) -> None:
        nonlocal came_at
        if not is_ending():
            came_at = loop.time()
            begin(number)
        elif loop.time() - came_at > SAME_SIGNAL:
            end(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
