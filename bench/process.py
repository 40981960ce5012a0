"""A server as a child process: start it, know when it is ready, weigh it, stop it."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT = 600.0  # seconds; a first start may compile
STOP_TIMEOUT = 10.0  # seconds that a server has to end, and then those that it leaves behind
SET_CHILD_SUBREAPER = 36  # of prctl(2)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready. Memory is resident bytes, summed over its process and children."""

    url: str
    pid: int
    ready_seconds: float
    ready_memory: int

    def peak_memory(self) -> int:
        return memory(self.pid, "VmHWM")


class Neighbours:
    """How much of the machine others have used since this was made: a benchmark beside a build or
    a backup measures those too. Everything started by this process counts as its own."""

    def __init__(self) -> None:
        self._busy, self._own, self._time = busy_ticks(), own_ticks(), time.perf_counter()

    def share(self) -> float:
        """Of all cores, 0 to 1. Servers must be over by then (`running`), or count as others."""
        spent = (busy_ticks() - self._busy) - (own_ticks() - self._own)
        all_ticks = (time.perf_counter() - self._time) * TICKS * (os.cpu_count() or 1)
        return max(spent / all_ticks, 0.0)


TICKS = os.sysconf("SC_CLK_TCK")


def busy_ticks() -> int:
    """What all processors have worked since the machine started."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return user + nice + system


def own_ticks() -> float:
    """What this process has worked, and every process below it that was waited for."""
    times = os.times()
    return TICKS * (times.user + times.system + times.children_user + times.children_system)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str],
    port: int,
    ready: str = "/ready",
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[Server]:
    """Run a server until the block ends. Its output goes to ``log``, by default nowhere.

    Raises:
        RuntimeError: it ended, or was not ready in time.
    """
    url = f"http://127.0.0.1:{port}"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # stop it then too
    adopt_orphans()
    started = time.perf_counter()
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    with open(log or os.devnull, "wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        try:
            wait_until_ready(process, url + ready, log)
            seconds = time.perf_counter() - started
            yield Server(url, process.pid, seconds, memory(process.pid, "VmRSS"))
        finally:
            stop(process)


def environment(checkout: Path) -> dict[str, str]:
    """The variables that make a Python import ruvon from there, compiled to bytecode once."""
    asked = {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": ""}
    return {**os.environ, **asked}


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path | None) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            told = log.read_text(errors="replace")[-2000:] if log else ""
            raise RuntimeError(f"{process.args} ended with {process.returncode}\n{told}")
        if answers(url):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{process.args} was not ready after {START_TIMEOUT:.0f} s")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def adopt_orphans() -> None:
    """Become the parent of what our children leave behind, instead of init. What workers of a
    server have done can only be told from others' work by whoever waits for them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask first, insist later; children too, most of which share its session."""
    members = family(process.pid)
    for ask in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, ask)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_TIMEOUT)
            break
    deadline = time.monotonic() + STOP_TIMEOUT
    for pid in members:
        reap(pid, deadline)


def reap(pid: int, deadline: float) -> None:
    """Wait for an orphan, which makes its work ours (`own_ticks`); after ``deadline``, kill it."""
    with suppress(ChildProcessError):  # it was waited for already
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def memory(pid: int, field: str) -> int:
    """One field of /proc/PID/status, in bytes, summed over the process and all its children."""
    total = 0
    for one in family(pid):
        try:
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
    return total


def family(pid: int) -> list[int]:
    """A process and all below it, parents first."""
    children = defaultdict(list)
    for child, parent in parents().items():
        children[parent].append(child)
    found = [pid]
    for member in found:  # grows as it goes
        found += children[member]
    return found


def parents() -> dict[int, int]:
    """The parent of each process. Children are listed by thread, and not by every kernel."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended since
            found[int(path.parent.name)] = int(stat_fields(path)[1])
    return found


def stat_fields(path: Path) -> list[str]:
    """What a ``stat`` of /proc says of a process or thread, from behind its name on."""
    return path.read_text(errors="replace").rpartition(")")[2].split()
