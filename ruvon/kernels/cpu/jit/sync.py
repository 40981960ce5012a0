"""How threads meet: atomics, waiting, sleeping, for code compiled by numba.

Waiting threads spin for a few microseconds, then give their core away (`sched_yield`) at each
further turn, for the event loop and other programs share the cores; at last they sleep.
"""

from __future__ import annotations

import platform
import sys
import time

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ruvon.kernels.cpu.jit.simd import I32, I64, call, define, load_as, pointer
from ruvon.kernels.cpu.jit.translate import helper

SPINS = 2000  # of some 20 ns, before a waiting thread gives way at each further turn
FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
FUTEX_WAIT, FUTEX_WAKE, EVERYBODY = 128, 129, 1 << 30  # the private kind


@intrinsic
def fetch_add(typing, address, amount):
    """Atomically add; returns the old value."""

    def emit(b, address, amount):
        return b.atomic_rmw("add", pointer(b, address, I64), amount, "seq_cst")

    return define(types.intp, (types.intp, types.intp), emit)


@intrinsic
def exchange(typing, address, value):
    """Atomically write, in order with all reads and writes before and after; returns the old."""

    def emit(b, address, value):
        return b.atomic_rmw("xchg", pointer(b, address, I64), value, "seq_cst")

    return define(types.intp, (types.intp, types.intp), emit)


@intrinsic
def replace_if(typing, address, old, new):
    """Atomically write ``new`` where ``old`` stands; whether it did."""

    def emit(b, address, old, new):
        at = pointer(b, address, I64)
        return b.extract_value(b.cmpxchg(at, old, new, "seq_cst", "seq_cst"), 1)

    return define(types.boolean, (types.intp, types.intp, types.intp), emit)


@intrinsic
def read_atomic(typing, address):
    """What is read afterwards is at least as new; what was added or exchanged before is seen by
    others before this reads. On Arm, "acquire" would not say so."""

    def emit(b, address):
        return b.load_atomic(pointer(b, address, I64), "seq_cst", 8)

    return define(types.intp, (types.intp,), emit)


@intrinsic
def finish_reads(typing):
    """What was read before is not newer than what is read afterwards. x86 never reads in another
    order."""
    return define(types.void, (), lambda b: b.fence("acquire"))


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
    """Let the operating system run something else on this core, if there is something."""

    def emit(b):
        call(b, "sched_yield", I32, [])

    return define(types.void, (), emit)


@intrinsic
def clock(typing, buffer):
    """Nanoseconds; ``buffer`` holds the two int64 of the C library's answer."""

    def emit(b, buffer):
        call(b, "clock_gettime", I32, [ir.Constant(I32, time.CLOCK_MONOTONIC), buffer])
        seconds = load_as(b, buffer, I64, 8)
        rest = load_as(b, b.add(buffer, ir.Constant(I64, 8)), I64, 8)
        return b.add(b.mul(seconds, ir.Constant(I64, 10**9)), rest)

    return define(types.intp, (types.intp,), emit)


@intrinsic
def futex(typing, address, operation, value):
    """Sleep while the low 32 bits at ``address`` are ``value``, or wake ``value`` sleepers. Where
    the system has no futex, a sleep ends by itself after a millisecond."""

    def emit(b, address, operation, value):
        if not FUTEX:
            waits = b.icmp_signed("==", operation, ir.Constant(I64, FUTEX_WAIT))
            call(b, "usleep", I32, [b.select(waits, ir.Constant(I32, 1000), ir.Constant(I32, 0))])
            return
        zero = ir.Constant(I64, 0)
        arguments = [ir.Constant(I64, FUTEX), address, operation, value, zero, zero, zero]
        call(b, "syscall", I64, arguments)

    return define(types.void, (types.intp,) * 3, emit)


@helper
def wait_a_little(turns):
    """One turn of waiting: busily at first, then letting others have the core."""
    if turns < SPINS:
        pause()
    else:
        give_way()
