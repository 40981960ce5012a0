"""Starting the processes of ranks, and what ends them."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from ruvon.engine.ranks.channel import Channel, Kind
from ruvon.engine.ranks.ring import NUMBER, PlanRing, own_memory
from ruvon.engine.resources import cores
from ruvon.errors import ConfigError

F_SETSIG = 10  # Linux's; the fcntl module has no name for it


@dataclass(frozen=True, slots=True)
class RankProcess:
    """A rank's process, as its parent sees it."""

    rank: int
    process: subprocess.Popen[bytes]
    channel: Channel
    lifeline: int  # closed by the parent's end, however it comes

    @property
    def ranks(self) -> range:
        """Those that are behind the channel: itself."""
        return range(self.rank, self.rank + 1)

    @property
    def name(self) -> str:
        return f"rank {self.rank}"

    def send(self, kind: Kind, payload: bytes = b"", *, rank: int = 0) -> None:
        with suppress(OSError):  # it has gone; whoever reads from it finds out how
            self.channel.send(kind, payload, rank=rank)

    def kill(self) -> None:
        self.process.kill()

    def fate(self) -> str:
        """How it ended, in words; it has, or is about to."""
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"ended with status {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was killed by {name}"

    def end(self, patience: float) -> None:
        """Wait for it to end by itself, then end it."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """Let go of it; it ends if it has not."""
        self.channel.close()
        os.close(self.lifeline)


def start_process(rank: int, store: int, environment: Mapping[str, str]) -> RankProcess:
    """Start a rank. It inherits its end of the channel, that of the lifeline, and the memory in
    which ranks find each other."""
    ours, theirs = socket.socketpair()
    read_end, write_end = os.pipe()
    folder = str(Path(__file__).parents[3])  # wherever this one was found
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    inherited = (theirs.fileno(), read_end, store)
    arguments = [str(rank), *map(str, inherited)]
    program = [
        sys.executable,
        "-P",
        "-m",
        "ruvon.engine.ranks.rank",
    ]  # -P: not the folder's modules
    try:
        process = subprocess.Popen(
            [*program, *arguments],
            env={**os.environ, **environment, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a library prints is no answer of ours
            pass_fds=inherited,
        )
    except OSError:
        ours.close()
        os.close(write_end)
        raise
    finally:
        theirs.close()
        os.close(read_end)
    return RankProcess(rank, process, Channel(ours), write_end)


def send_plan(number: int, data: bytes, ring: PlanRing, ranks: Sequence[RankProcess]) -> None:
    """Let ranks of this machine read a plan: where it lies in the ring, or in memory of its own if
    there is no room."""
    place = ring.write(number, data)
    if place is not None:
        for each in ranks:
            each.send(Kind.PLAN, place)
        return
    memory = own_memory(data)
    for each in ranks:
        with suppress(OSError):
            each.channel.send(Kind.LARGE_PLAN, NUMBER.pack(number), fds=(memory,))
    os.close(memory)


def hold_on_to(lifeline: int) -> None:
    """End this process as soon as the one that holds the other end of ``lifeline`` has, even by
    SIGKILL, and whatever this one is busy with: on Linux the system sees to it."""
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)

    def watch() -> None:
        os.read(lifeline, 1)  # there is nothing to read, ever: it ends when the pipe does
        os._exit(1)

    threading.Thread(target=watch, name="ruvon-lifeline", daemon=True).start()


def visible_devices(count: int, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The GPUs this process sees, by the names that CUDA_VISIBLE_DEVICES has for them."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def device_environments(num_ranks: int, count: int) -> list[dict[str, str]]:
    """For each rank of this machine the variable that makes its own GPU the first of all.

    A device that is named by nothing but "cuda" is then the right one in every thread; the others
    stay visible, as NCCL wants them. That all have the same number is no mistake, as torch's shared
    memory would think, whose multicast is of no use here.

    Raises ConfigError if there are not as many GPUs.
    """
    if num_ranks > count:
        raise ConfigError(
            f"--tensor-parallel-size times --pipeline-parallel-size is {num_ranks} ranks on this "
            f"machine, which has {count} CUDA device{'s' * (count != 1)}"
        )
    names = visible_devices(count)
    return [
        {
            "CUDA_VISIBLE_DEVICES": ",".join((names[i], *names[:i], *names[i + 1 :])),
            "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
            "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        }
        for i in range(num_ranks)
    ]


def share_cores(num_ranks: int, threads: int) -> list[list[int]] | None:
    """The CPUs that each rank of this machine is to stay on, where threads fill all cores: ranks
    then do not get into each other's way. None where the system shall place them."""
    own = cores()
    if threads < len(own) or num_ranks > len(own) or not hasattr(os, "sched_setaffinity"):
        return None
    firsts = [*accumulate(shares(len(own), num_ranks), initial=0)]
    return [own[first:end] for first, end in pairwise(firsts)]


def shares(total: int, num_ranks: int) -> list[int]:
    """Parts of a total, as equal as can be."""
    return [total * (i + 1) // num_ranks - total * i // num_ranks for i in range(num_ranks)]
