"""Files that count anew when they change: keys and certificates."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import structlog
from aiohttp import web

from ruvon.config import ServerConfig
from ruvon.errors import ConfigError
from ruvon.server.keys import Keys, read_keys
from ruvon.server.tls import Certificate

log = structlog.get_logger(__name__)

EVERY = 1.0  # seconds between looks

Stamp: TypeAlias = tuple[int, ...] | None
"""What tells one state of a file from another; None if it is not there."""


@dataclass(frozen=True, slots=True)
class Watched:
    """Files, and what to do, in a thread, when one of them has changed. It raises ConfigError for
    what is no good, and leaves things as they were."""

    paths: Sequence[str]
    reload: Callable[[], None]


def watch_files(watched: Sequence[Watched]) -> Callable[[web.Application], AsyncIterator[None]]:
    """A ``cleanup_ctx`` that looks at the files every now and then."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(watch(one)) for one in watched]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    return context


async def watch(watched: Watched) -> None:
    before = await asyncio.to_thread(stamps, watched.paths)
    while True:
        await asyncio.sleep(EVERY)
        now = await asyncio.to_thread(stamps, watched.paths)
        if now != before:
            before = now
            await asyncio.to_thread(reload, watched)


def stamps(paths: Sequence[str]) -> list[Stamp]:
    """Of each file; one behind a link that was turned to another is another."""
    return [stamp(path) for path in paths]


def stamp(path: str) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


def reload(watched: Watched) -> None:
    try:
        watched.reload()
    except ConfigError as error:
        log.error("reload_failed", error=str(error), hint="what was there before still counts")
    else:
        log.info("reloaded", files=list(watched.paths))


def reload_now(all_watched: Sequence[Watched]) -> None:
    """Begin to read all files again, whether they have changed or not."""
    if not all_watched:
        log.info("nothing_to_reload", hint="no keys or certificates come from files")
    for one in all_watched:
        asyncio.get_running_loop().run_in_executor(None, reload, one)


WATCHED = web.AppKey("watched", Sequence[Watched])


def watched(server: ServerConfig, keys: Keys, certificate: Certificate | None) -> list[Watched]:
    """The files that count anew when they change."""
    key_files = [path for path in (server.api_key_file, server.admin_key_file) if path is not None]
    found = [Watched(key_files, lambda: keys.replace(read_keys(server)))] if key_files else []
    if certificate is not None:
        files = [path for path in (server.tls_cert, server.tls_key) if path is not None]
        found.append(Watched(files, certificate.reload))
    return found
