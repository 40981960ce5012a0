"""What a command line does with its own process: its streams, its interrupts, its imports."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Errors of whoever has to take what is written: no place in the program explains them."""


def open_closed_streams() -> None:
    """Give what the caller closed (``2>&-``) to the null device. Python has None there; and a
    socket that took the free number would be sent what libraries print."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115


@contextmanager
def importing() -> Iterator[None]:
    """Around imports that take seconds.

    Ctrl-C ends the process at once there: as an exception it would reach modules written in C that
    make an ImportError of it, or pass it over. And imports make much and drop little, so that the
    garbage collector takes a seventh of the time for nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # nohup and its like ignore it, and so it stays
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
