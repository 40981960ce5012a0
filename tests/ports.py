"""Ports for servers that are started, and started again, by number."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

PORTS = range(10_000, 32_768)
"""Below those that the system gives out by itself: nobody who asks for any port gets one of these
between two starts, or shares it as one of many listeners."""


def free_port() -> int:
    """One on which nobody listens. Drawn from the system's own numbers, for a test's may be fixed
    by a seed that another process has as well."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
