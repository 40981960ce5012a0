"""Threads that run a program together: the CPU's answer to a kernel launch.

Every thread walks the whole program (see `graph`). An instruction's units of work are cut into
*parts*; a thread claims the parts that are its own, then those that others have not come to, and
goes on when all parts are done. One native call runs everything with the GIL released: what a
step costs beside its arithmetic is some 0.2 µs an instruction.

Nobody waits for a thread, only for parts. Cores are shared with the event loop, clients and other
programs, and a thread that the operating system holds up would hold up all others at a barrier;
here they do its work meanwhile, and when it returns it finds that its claims come too late and
catches up. So that it is not held up with a part in hand, it offers its core from time to time
between instructions.

Claims and completions are counted in words that carry the number of their instruction (ever
increasing, over all programs), so that a late thread cannot take them for its own, and a few of
them serve all instructions in turn.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ruvon.kernels.cpu.arguments import Key
from ruvon.kernels.cpu.layout import aligned_bytes
from ruvon.kernels.cpu.params import SCRATCH_BYTES

# The control block, in bytes. What threads write has a cache line to itself.
EPOCH = 0  # programs begun so far
SLEEPING = 64  # threads asleep
STOP = 128
SCRATCH = 136  # address of the threads' scratch space
JOBS, JOB_BYTES = 192, 128  # two of them, the newest is number EPOCH % 2
PROGRAM, COUNT, FIRST, PARAMS = 0, 8, 16, 64  # in a job; FIRST numbers its first instruction
COUNTERS = 448  # SLOTS times (a word of parts done, then a word of parts claimed for each thread)
SLOTS = 8

MOST_IN_USE = 16  # programs that are kept before it is looked which are still in use


class ThreadPool:
    """The threads, their scratch space, and the control block they meet at.

    Thread 0 is whoever calls `run`; the others are parked. Each can be held to a core of its own
    (the caller while it runs, unless it has settled).
    """

    def __init__(
        self, threads: int, address: Callable[[Key], int], cores: Sequence[int] | None = None
    ) -> None:
        """``address`` finds the entries of `jit.threads`, and belongs to what keeps their code,
        which stays while a thread is in one; ``cores`` has one for each thread to be held to."""
        self.threads = threads
        self._code = address
        counters = SLOTS * 64 * (1 + threads)
        control = aligned_bytes(COUNTERS + counters + 64 * threads).view(torch.int64)
        self._control = control.numpy()
        self._presence = self._control[(COUNTERS + counters) // 8 :: 8]
        self._scratch = aligned_bytes(threads * SCRATCH_BYTES)
        self._control[SCRATCH // 8] = self._scratch.data_ptr()
        self._leader = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 2)(address(("leader", None)))
        self._worker = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 4)(address(("worker", None)))
        self._address = int(self._control.ctypes.data)
        self._epoch = 0
        self._first = 1  # number of the next program's first instruction
        self._in_use: deque[tuple[int, Tensor]] = deque()
        self._busy = threading.Lock()
        self._cores: Sequence[int | None] = cores or [None] * threads
        self._settled: int | None = None  # the thread that stays on the first core
        self._others = [
            threading.Thread(target=self._park, args=(thread,), name=f"ruvon-{thread}", daemon=True)
            for thread in range(1, threads)
        ]
        for other in self._others:
            other.start()

    def run(self, program: Tensor, params: Sequence[int]) -> None:
        """Run a program's instructions [count, int64 fields]; returns when all are done."""
        with self._busy, held_to(self._core_to_take()):
            if not self.threads:
                raise RuntimeError("the thread pool was closed")
            job = self._next_job()
            job[PROGRAM // 8] = program.data_ptr()
            job[COUNT // 8] = program.shape[0]
            job[FIRST // 8] = self._first
            job[PARAMS // 8 : PARAMS // 8 + len(params)] = params
            self._first += program.shape[0]
            self._in_use.append((self._epoch, program))
            self._leader(self._address, self.threads)
            if len(self._in_use) > MOST_IN_USE:
                self._forget_finished()

    def settle(self) -> None:
        """Keep the calling thread on thread 0's core for good, which saves `run` from moving it
        there and back each time."""
        if self._cores[0] is not None:
            os.sched_setaffinity(0, {self._cores[0]})
            self._settled = threading.get_ident()

    def _core_to_take(self) -> int | None:
        return None if threading.get_ident() == self._settled else self._cores[0]

    def _next_job(self) -> np.ndarray[Any, Any]:
        """The one that no thread reads: of two, the older."""
        self._epoch += 1
        start = (JOBS + JOB_BYTES * (self._epoch % 2)) // 8
        return self._control[start : start + JOB_BYTES // 8]

    def _forget_finished(self) -> None:
        """A thread that was held up may still look at a program that the others have finished, so
        its memory stays until none of them is in it. Whoever comes now sees the newest one."""
        present = self._presence[self._presence > 0]
        oldest = int(present.min()) if present.size else self._epoch
        while self._in_use[0][0] < oldest:
            self._in_use.popleft()

    def close(self) -> None:
        """End the parked threads; unless a program still runs, which can only be stuck. Its threads
        keep what they use, and as daemons they do not keep the process."""
        if not self._busy.acquire(blocking=False):
            return
        self._control[STOP // 8] = 1
        self._next_job()[COUNT // 8] = 0
        self._leader(self._address, 1)  # nothing to run, but the epoch moves on
        for other in self._others:
            other.join()
        self.threads = 0
        self._busy.release()

    def _park(self, thread: int) -> None:
        presence = self._presence[thread:].ctypes.data
        with held_to(self._cores[thread]):
            self._worker(self._address, presence, thread, self.threads)


@contextmanager
def held_to(core: int | None) -> Iterator[None]:
    """Keep the calling thread on this core meanwhile."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
