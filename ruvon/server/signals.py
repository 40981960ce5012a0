"""Signals to a server, or to a router before servers."""

from __future__ import annotations

import asyncio
import errno
import math
import signal
import termios
from collections.abc import Callable

STDERR = 2
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


def watch_hangup(end: Callable[[signal.Signals], None], again: Callable[[], None]) -> None:
    """SIGHUP: do things ``again``, as services are asked to; or ``end``, when it means that the
    terminal is gone in which the server was started."""

    def on_hangup() -> None:
        if is_hung_up(STDERR):
            end(signal.SIGHUP)
        else:
            again()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)


def is_hung_up(descriptor: int) -> bool:
    """Whether it is a terminal's that is gone."""
    try:
        termios.tcgetattr(descriptor)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)
    return False
