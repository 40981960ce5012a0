"""The listening sockets."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import ssl
import stat
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import Any

from aiohttp import web

from ruvon.errors import ConfigError

BACKLOG = 1024  # connections that may wait to be accepted
ACCEPTED = 16  # of them, in one turn of the event loop

LACKING = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})  # no such address on this machine


async def listen(
    runner: web.AppRunner, host: str, port: int, tls: ssl.SSLContext | None = None
) -> tuple[str, int]:
    """Take connections; returns the address, with the port that was chosen for port 0.

    uvloop accepts one connection for each listener and turn of its loop. Here a turn may hold a
    step of the engine, and hundreds of clients who come at once would wait for as many steps. So
    each socket has several listeners.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        with ExitStack() as stack:
            for sock in bind(dict.fromkeys((info[0], info[4]) for info in infos), stack):
                for _ in range(ACCEPTED):
                    site = web.SockSite(runner, sock.dup(), ssl_context=tls, backlog=BACKLOG)
                    await site.start()
    except OSError as error:
        # `socket.create_server` says the address a second time in its own text.
        resolving = isinstance(error, socket.gaierror)
        reason = error.strerror if resolving else os.strerror(error.errno or 0)
        raise ConfigError(f"cannot listen on {host} port {port}: {reason}") from error
    shown_host, shown_port = runner.addresses[0][:2]
    return shown_host, shown_port


async def listen_unix(runner: web.AppRunner, path: str) -> None:
    """Take connections on a Unix socket. Whoever may write to it may connect: it is made for its
    owner alone.

    Raises:
        ConfigError: there can be no socket.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        with suppress(FileNotFoundError):
            remove_left_socket(path)
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(BACKLOG)
        await web.SockSite(runner, sock, backlog=BACKLOG).start()
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"cannot listen on {path}: {reason}") from error


def remove_left_socket(path: str) -> None:
    """Remove the socket of a server that is gone. That of one who still listens stays, and so the
    path is in use."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        if stat.S_ISSOCK(os.stat(path).st_mode) and probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)


def bind(
    addresses: Iterable[tuple[socket.AddressFamily, Any]], stack: ExitStack
) -> list[socket.socket]:
    """A socket for each address, open as long as ``stack``, but for kinds this machine lacks. Where
    all are of IPv6, the one that means every address takes IPv4 in as well."""
    addresses = list(addresses)
    both = socket.has_dualstack_ipv6() and all(f == socket.AF_INET6 for f, _ in addresses)
    sockets: list[socket.socket] = []
    lacking: OSError | None = None
    for family, address in addresses:
        try:
            sock = socket.create_server(
                address, family=family, backlog=BACKLOG, dualstack_ipv6=both
            )
        except OSError as error:
            if error.errno not in LACKING:
                raise
            lacking = error
        else:
            sockets.append(stack.enter_context(sock))
    if not sockets and lacking is not None:
        raise lacking
    return sockets


def allow_files(wanted: int) -> None:
    """Let the process have so many files open, as far as it may: many systems begin with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):  # macOS has a bound that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
