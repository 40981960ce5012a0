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


def run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """The exit code of ``python *command``, and what it wrote to stdout and stderr."""
    process = Forked(command, environment, stdout_too=True)
    with process.stderr as output:
        text = output.read()
    return process.wait(), text


class Forked:
    """As much of `subprocess.Popen` as tests of servers use, for ``python *command``; what it
    writes to stderr, and perhaps to stdout, is read from `stderr`."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdout_too: bool = False,
    ) -> None:
        reader, writer = CONTEXT.Pipe(duplex=False)
        streams = (1, 2) if stdout_too else (2,)
        arguments = (command, dict(environment), os.getcwd(), streams, writer)
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
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    streams: Sequence[int],
    writer: Connection,
) -> None:
    """Be ``python *command``: a file, a module after -m, or code after -c."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream in streams:
        os.dup2(writer.fileno(), stream)
    writer.close()
    kind = command[0] if command[0] in ("-m", "-c") else ""
    what, *arguments = command[1:] if kind else command
    sys.argv = [kind if kind == "-c" else what, *arguments]
    if kind == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        start = runpy.run_module if kind else runpy.run_path
        start(what, run_name="__main__")
