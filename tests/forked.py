"""Python programs in processes that have imported torch and the server already: each is a fork of
one that did so once, which spares it the better part of a start. Where forks are not, the program
starts as ever.

Nothing else is imported here, for each fork does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["ruvon.cli", "ruvon.server.app", "ruvon.engine.startup", "ruvon.engine.cpu_sampler"]
)


class Forked:
    """As much of `subprocess.Popen` as tests of servers use, for ``python *command`` whose stderr
    is read line by line."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        reader, writer = CONTEXT.Pipe(duplex=False)
        arguments = (command, dict(environment), os.getcwd(), writer)
        self._process = CONTEXT.Process(target=become, args=arguments)
        self._process.start()
        writer.close()
        self.stderr = os.fdopen(os.dup(reader.fileno()))
        reader.close()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def become(
    command: Sequence[str], environment: Mapping[str, str], folder: str, stderr: Connection
) -> None:
    """Be ``python *command``, a module after -m or a file."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(stderr.fileno(), sys.stderr.fileno())
    stderr.close()
    is_module = command[0] == "-m"
    sys.argv = list(command[1 if is_module else 0 :])
    run = runpy.run_module if is_module else runpy.run_path
    run(sys.argv[0], run_name="__main__")
