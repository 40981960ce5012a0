"""What a command line does with its own process: its streams."""

from __future__ import annotations

import errno
import os
import sys

DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Errors of whoever has to take what is written: no place in the program explains them."""


def open_closed_streams() -> None:
    """Give what the caller closed (``2>&-``) to the null device. Python has None there; and a
    socket that took the free number would be sent what libraries print, and libuv ends a process
    that closes one which it takes for stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
