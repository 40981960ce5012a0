"""The process that grammars are tried in (`ruvon.engine.grammar_trial`), as who asks it sees it."""

from __future__ import annotations

import errno
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from ruvon.engine import grammar_trial
from ruvon.engine.grammar_trial import LENGTH
from ruvon.errors import UnavailableError

PATIENCE = 15.0  # seconds for a trial: a bound for a machine that has no time for it
TOO_COSTLY = "it takes more time or memory to compile than a request may use"
NO_TIME = "This machine had no time to compile the grammar; the request may be tried again."
NO_ROOM = "This machine had no room to compile the grammar; the request may be tried again."
RETRY_AFTER = 5.0  # seconds
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})
"""Of what a process needs: files, processes, memory. There may be some again soon."""


class Trial:
    """Starts the process when it is first needed, and again when a grammar has ended it. For one
    thread at a time."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False

    def error_of(self, text: str) -> str:
        """Why a grammar does not compile; empty if it does. Raises RuntimeError if no process can
        be had, UnavailableError if one does not come to its end for others' sake: it is bounded in
        processor time, so the grammar is to blame only for what happens within that."""
        process = self._started()
        request = text.encode(errors="replace")
        try:
            send(process, LENGTH.pack(len(request)) + request)
            return receive(process)
        except TimeoutError:
            self.close()
            raise UnavailableError(NO_TIME, RETRY_AFTER) from None
        except (OSError, EOFError):
            self.close()
            if process.returncode == -signal.SIGKILL:  # by the system, or by `close`
                raise UnavailableError(NO_TIME, RETRY_AFTER) from None
            return TOO_COSTLY

    def _started(self) -> subprocess.Popen[bytes]:
        """The process, ready. One that needs longer than a request waits goes on starting."""
        try:
            process = self._process or self._start()
            if not self._ready:
                receive(process)
        except TimeoutError:
            raise UnavailableError(NO_TIME, RETRY_AFTER) from None
        except (OSError, EOFError) as error:
            self.close()
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                raise UnavailableError(NO_ROOM, RETRY_AFTER) from None
            raise RuntimeError("the process that tries grammars does not start") from error
        self._ready = True
        return process

    def _start(self) -> subprocess.Popen[bytes]:
        program = [grammar_trial.__file__, str(self._vocab_size)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", *program],  # -P: the folder's modules are not to be found
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
        )  # fmt: skip
        return self._process

    def close(self) -> None:
        process, self._process, self._ready = self._process, None, False
        if process is None:
            return
        process.kill()  # one that has ended by itself still says how
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what it was not sent any more
                pipe.close()  # type: ignore[union-attr]


def send(process: subprocess.Popen[bytes], request: bytes) -> None:
    """All of a request: an unbuffered pipe may take less at once."""
    pipe: Any = process.stdin
    rest = memoryview(request)
    while rest:
        rest = rest[pipe.write(rest) :]


def receive(process: subprocess.Popen[bytes]) -> str:
    """An answer. Raises EOFError if the process ends, TimeoutError if it takes too long."""
    deadline = time.monotonic() + PATIENCE
    (size,) = LENGTH.unpack(receive_bytes(process, 4, deadline))
    return receive_bytes(process, size, deadline).decode(errors="replace")


def receive_bytes(process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
    pipe: Any = process.stdout
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(received) < size:
            if not selector.select(max(deadline - time.monotonic(), 0)):
                raise TimeoutError
            piece = pipe.read(size - len(received))
            if not piece:
                raise EOFError
            received += piece
    return received
