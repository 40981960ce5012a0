"""Work beside the event loop's thread, in threads that nobody has to wait for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class Aside:
    """A thread for what takes long, one thing after another."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self.num_waiting = 0  # and under way

    async def run(self, work: Callable[[], T]) -> T:
        """Do ``work`` there, in its turn."""
        self.num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self.num_waiting -= 1

    def close(self) -> None:
        """Begin nothing more, and wait for nothing."""
        self._thread.shutdown(wait=False, cancel_futures=True)


async def in_thread(work: Callable[[], T], name: str) -> T:
    """Run ``work`` in a thread of its own, called ``name``, that does not keep the process alive:
    it may take minutes, and a signal ends the server at once all the same."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_outcome: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(lambda: None if future.done() else set_outcome())

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            settle(lambda error=error: future.set_exception(error))  # type: ignore[misc]
        else:
            settle(lambda: future.set_result(result))

    threading.Thread(target=run, name=name, daemon=True).start()
    return await future
