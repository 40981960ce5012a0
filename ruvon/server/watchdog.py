"""A thread that looks whether steps end and the event loop turns, and ends the process if not.

A process that hangs answers nobody, and often its health check all the same. This one writes what
it was doing to the log, tells its clients, and exits with `EXIT_CODE`, so that a supervisor starts
it anew. Where not even this thread gets to run, for some native call keeps the interpreter's lock,
`faulthandler` writes the stacks and ends the process (with code 1).
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import structlog

from ruvon.errors import EngineDeadError
from ruvon.server.state import State

log = structlog.get_logger(__name__)

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
EVERY = 1.0  # seconds between two looks
GOODBYE = 5.0  # seconds in which clients are told before the process ends
LOCKED = 60.0  # seconds beyond patience that the interpreter's lock may be held


class Watchdog:
    """Counts how long nothing has moved. Time in which it did not run itself, such as while the
    process was stopped or its machine asleep, does not count."""

    def __init__(
        self,
        state: State,
        turn: Callable[[Callable[[], None]], object],
        patience: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``turn`` has the event loop call something in its next turn."""
        self._state = state
        self._turn = turn
        self._patience = patience
        self._clock = clock
        self._looked_at = clock()
        self._progressed_at = 0.0  # when the engine had last finished a step
        self._has_turned = True
        self._idle_engine = self._idle_loop = 0.0  # seconds

    def look(self) -> str | None:
        """Take note of what has moved; what is wrong, if anything is."""
        elapsed = min(self._clock() - self._looked_at, 2 * EVERY)
        self._looked_at = self._clock()
        if self._state.service is None:
            return None
        generator = self._state.service.generator
        if generator.dead is not None:
            return "the engine has failed"
        progressed_at = generator.progressed_at
        moved = progressed_at != self._progressed_at or not generator.num_open
        self._idle_engine = 0.0 if moved else self._idle_engine + elapsed
        self._progressed_at = progressed_at
        self._idle_loop = 0.0 if self._has_turned else self._idle_loop + elapsed
        self._has_turned = False
        self._turn(self._note_turn)
        if self._idle_loop > self._patience:
            return f"the event loop has not turned for {self._idle_loop:.0f} seconds"
        if self._idle_engine > self._patience:
            return f"no step was finished for {self._idle_engine:.0f} seconds, though there is work"
        return None

    def _note_turn(self) -> None:
        self._has_turned = True

    def report(self, why: str) -> None:
        """Write down what is going on, and fail all that waits for the engine."""
        service = self._state.service
        assert service is not None
        with suppress(Exception):  # such as a dict that changes while it is read
            log.critical("stuck", why=why, **service.generator.describe(), stack=stacks())
        error = EngineDeadError(f"The server is stuck: {why}.")
        self._turn(lambda: service.generator.fail(error))


def stacks() -> str:
    """Of all threads."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


@contextmanager
def watching(state: State, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Watch a server as long as this lasts, if its settings say so."""
    patience = state.server.watchdog_timeout
    if not patience:
        yield
        return
    over = threading.Event()
    watchdog = Watchdog(state, loop.call_soon_threadsafe, patience)
    thread = threading.Thread(
        target=_watch, args=(watchdog, over, patience), name="ruvon-watchdog", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(watchdog: Watchdog, over: threading.Event, patience: float) -> None:
    try:
        while True:
            _guard_lock(patience)
            if over.wait(EVERY):
                break
            why = watchdog.look()
            if why is not None:
                watchdog.report(why)
                _guard_lock(GOODBYE)
                over.wait(GOODBYE)
                os._exit(EXIT_CODE)
    except RuntimeError:  # the event loop is closed: the server has ended
        pass
    finally:
        faulthandler.cancel_dump_traceback_later()


def _guard_lock(patience: float) -> None:
    """Begin to wait anew for the moment at which this thread should have run again."""
    with suppress(OSError, ValueError, AttributeError, RuntimeError):  # no stderr: nothing to tell
        faulthandler.dump_traceback_later(patience + LOCKED, exit=True)
