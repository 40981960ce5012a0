"""A team of threads that runs a program together: the CPU's answer to a kernel launch.

Every thread walks the whole program (see `program`). Each instruction's units of work are shared
out, most of them beforehand, the rest from a counter, and a barrier stands between instructions.
One native call runs all of it with the GIL released: what a step costs beside its arithmetic is a
barrier of about 0.2 µs an instruction.

Waiting threads spin for a few microseconds, then give their core away (`sched_yield`): the event
loop and the clients share the cores. Between programs they sleep on a futex.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from ruvon.kernels.cpu.layout import aligned_bytes
from ruvon.kernels.cpu.program import COUNTER_BYTE, INSTRUCTION_BYTES, Field, get
from ruvon.kernels.cpu.simd import I32, I64, call, define, pointer, prefetch, read_i64, write_i64

# The control block, one cache line (8 int64) a field that threads write.
EPOCH, ARRIVED, GENERATION, SLEEPING, PROGRAM = 0, 64, 128, 192, 256
COUNT, PARAMS, SCRATCH, STOP = PROGRAM + 8, PROGRAM + 16, PROGRAM + 24, PROGRAM + 32
CONTROL_BYTES = 320
SCRATCH_BYTES = 1 << 18  # for each thread
FETCH_AT, FETCH_END = SCRATCH_BYTES - 64, SCRATCH_BYTES - 56  # in a thread's scratch space
MOST_FETCHED = 1 << 17  # bytes: a part of the second-level cache

SPINS = 1000  # of some 20 ns, before a waiting thread gives way at each further turn
TURNS_BEFORE_SLEEP = 3000  # spins included
FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
FUTEX_WAIT, FUTEX_WAKE = 128, 129  # the private kind


@intrinsic
def fetch_add(typing, address, amount):
    """Atomically add; returns the old value."""

    def emit(b, address, amount):
        return b.atomic_rmw("add", pointer(b, address, I64), amount, "seq_cst")

    return define(types.intp, (types.intp, types.intp), emit)


@intrinsic
def read_atomic(typing, address):
    def emit(b, address):
        return b.load_atomic(pointer(b, address, I64), "acquire", 8)

    return define(types.intp, (types.intp,), emit)


@intrinsic
def write_atomic(typing, address, value):
    def emit(b, address, value):
        b.store_atomic(value, pointer(b, address, I64), "release", 8)

    return define(types.void, (types.intp, types.intp), emit)


@intrinsic
def pause(typing):
    """Tell the core that this is a spin loop."""

    def emit(b):
        machine = platform.machine()
        if machine in ("x86_64", "AMD64"):
            call(b, "llvm.x86.sse2.pause", ir.VoidType(), [])
        elif machine in ("aarch64", "arm64"):
            call(b, "llvm.aarch64.hint", ir.VoidType(), [ir.Constant(I32, 1)])

    return define(types.void, (), emit)


@intrinsic
def give_way(typing):
    """Let the operating system run something else on this core."""
    return define(types.void, (), lambda b: void(call(b, "sched_yield", I32, [])))


@intrinsic
def futex(typing, address, operation, value):
    """Sleep while the low 32 bits at ``address`` are ``value``, or wake ``value`` sleepers."""

    def emit(b, address, operation, value):
        if not FUTEX:
            call(b, "sched_yield", I32, [])
            return
        zero = ir.Constant(I64, 0)
        arguments = [ir.Constant(I64, FUTEX), address, operation, value, zero, zero, zero]
        call(b, "syscall", I64, arguments)

    return define(types.void, (types.intp,) * 3, emit)


def void(_: ir.Value) -> None:
    """Drop an LLVM value."""


@intrinsic
def call_kernel(typing, kernel, instruction, params, start, stop, scratch):
    """Call the C function at an address."""

    def emit(b, kernel, *arguments):
        kind = ir.FunctionType(ir.VoidType(), [I64] * 5)
        b.call(b.inttoptr(kernel, kind.as_pointer()), arguments)

    return define(types.void, (types.intp,) * 6, emit)


@njit
def plan_fetching(instruction, thread, threads, scratch):
    """Note which tiles this thread will multiply next, for `fetch_some`."""
    size = get(instruction, Field.NEXT_UNITS) // threads * get(instruction, Field.NEXT_UNIT_BYTES)
    start = get(instruction, Field.NEXT) + thread * size
    write_i64(scratch + FETCH_AT, start)
    write_i64(scratch + FETCH_END, start + min(size, MOST_FETCHED))


@njit
def fetch_some(scratch, lines):
    """Ask for the next few cache lines of what was planned; False if there are none left."""
    at = read_i64(scratch + FETCH_AT)
    if at >= read_i64(scratch + FETCH_END):
        return False
    for line in range(lines):
        prefetch(at + 64 * line)
    write_i64(scratch + FETCH_AT, at + 64 * lines)
    return True


@njit
def wait_for_all(control, threads, scratch):
    """Return once every thread of the team is here. Who waits fetches weights meanwhile."""
    generation = read_atomic(control + GENERATION)
    if fetch_add(control + ARRIVED, 1) == threads - 1:
        write_atomic(control + ARRIVED, 0)
        write_atomic(control + GENERATION, generation + 1)
        return
    turns = 0
    while read_atomic(control + GENERATION) == generation:
        if not fetch_some(scratch, 4):
            wait_a_little(turns)
            turns += 1


@njit
def wait_a_little(turns):
    """One turn of waiting: busily at first, then letting others have the core."""
    if turns < SPINS:
        pause()
    else:
        give_way()


@njit
def run_instruction(instruction, params, thread, threads, scratch):
    """This thread's share of one instruction.

    Units are dealt out beforehand in equal runs, so that a thread streams through its weights and
    meets the same ones every step; what does not go evenly is drawn one by one. Who computes a
    unit does not change its result.
    """
    kernel = get(instruction, Field.KERNEL)
    units = get(params, get(instruction, Field.COUNT)) * get(instruction, Field.PER_COUNT)
    if threads == 1:
        call_kernel(kernel, instruction, params, 0, units, scratch)
        return
    share = 0 if get(instruction, Field.DRAWN) else units // threads
    if share > 0:
        call_kernel(kernel, instruction, params, thread * share, (thread + 1) * share, scratch)
    while True:
        unit = threads * share + fetch_add(instruction + COUNTER_BYTE, 1)
        if unit >= units:
            return
        call_kernel(kernel, instruction, params, unit, unit + 1, scratch)


@njit
def run_program(control, thread, threads):
    program, params = read_i64(control + PROGRAM), read_i64(control + PARAMS)
    scratch = read_i64(control + SCRATCH) + thread * SCRATCH_BYTES
    for index in range(read_i64(control + COUNT)):
        instruction = program + index * INSTRUCTION_BYTES
        plan_fetching(instruction, thread, threads, scratch)
        run_instruction(instruction, params, thread, threads, scratch)
        if threads > 1:
            wait_for_all(control, threads, scratch)
        if thread == 0:
            write_i64(instruction + COUNTER_BYTE, 0)


@njit
def wait_for_program(control, epoch):
    """Spin a little, then sleep, until the epoch moves on from ``epoch``."""
    turns = 0
    while read_atomic(control + EPOCH) == epoch:
        if turns < TURNS_BEFORE_SLEEP:
            wait_a_little(turns)
            turns += 1
        else:
            fetch_add(control + SLEEPING, 1)
            futex(control + EPOCH, FUTEX_WAIT, epoch)
            fetch_add(control + SLEEPING, -1)


def lead(control, threads):
    """The calling thread's part: publish the program, run it as thread 0."""
    fetch_add(control + EPOCH, 1)
    if read_atomic(control + SLEEPING) > 0:
        futex(control + EPOCH, FUTEX_WAKE, 1 << 30)
    run_program(control, 0, threads)


def follow(control, thread, threads):
    """A parked thread's whole life."""
    epoch = 0
    while True:
        wait_for_program(control, epoch)
        epoch += 1
        if read_atomic(control + STOP) != 0:
            return
        run_program(control, thread, threads)


class Team:
    """The threads, their scratch space, and the control block they meet at.

    Thread 0 is whoever calls `run`; the others are parked. Each is held to a core of its own where
    the operating system allows that (the caller while it runs): two that meet on one core would
    wait for each other at every barrier.
    """

    def __init__(self, threads: int, lead: int, follow: int) -> None:
        """``lead`` and ``follow`` are the addresses of the compiled entries of this file."""
        self.threads = threads
        self._control = aligned_bytes(CONTROL_BYTES).view(torch.int64)
        self._scratch = aligned_bytes(threads * SCRATCH_BYTES)
        self._control[SCRATCH // 8] = self._scratch.data_ptr()
        self._lead = ctypes.CFUNCTYPE(None, ctypes.c_ssize_t, ctypes.c_ssize_t)(lead)
        self._follow = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 3)(follow)
        self._address = self._control.data_ptr()
        self._busy = threading.Lock()
        self._cores = cores_for(threads)
        self._others = [
            threading.Thread(target=self._park, args=(thread,), name=f"ruvon-{thread}", daemon=True)
            for thread in range(1, threads)
        ]
        for other in self._others:
            other.start()

    def run(self, program: int, count: int, params: int) -> None:
        """Run ``count`` instructions at address ``program``; returns when all are done."""
        with self._busy, held_to(self._cores[0]):
            assert self.threads, "the team was closed"
            self._control[PROGRAM // 8] = program
            self._control[COUNT // 8] = count
            self._control[PARAMS // 8] = params
            self._lead(self._address, self.threads)

    def close(self) -> None:
        """End the parked threads."""
        with self._busy:
            self._control[STOP // 8] = 1
            self._control[COUNT // 8] = 0
            self._lead(self._address, 1)  # nothing to run, but the epoch moves on
            for other in self._others:
                other.join()
            self.threads = 0

    def _park(self, thread: int) -> None:
        with held_to(self._cores[thread]):
            self._follow(self._address, thread, self.threads)


def cores_for(threads: int) -> list[int | None]:
    """A core for each thread; None where there are too few, or the system does not say."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [*cores[:threads]] if 1 < threads <= len(cores) else [None] * threads


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
