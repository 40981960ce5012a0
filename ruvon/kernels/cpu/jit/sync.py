"""How threads meet: atomics, waiting, sleeping, for code compiled by numba.

Waiting threads spin for a few microseconds, then give their core away (`sched_yield`) at each
further turn, for the event loop and other programs share the cores; at last they sleep.
"""

from __future__ import annotations

import platform
import sys
import time
from typing import Any

from llvmlite import ir
from numba import types

from ruvon.kernels.cpu.jit.llvm import I32, I64, Builder, number
from ruvon.kernels.cpu.jit.simd import operation
from ruvon.kernels.cpu.jit.translate import helper

SPINS = 2000  # of some 20 ns, before a waiting thread gives way at each further turn
FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
FUTEX_WAIT, FUTEX_WAKE, EVERYBODY = 128, 129, 1 << 30  # the private kind


def atomic(name: str) -> Any:
    """Atomically changes what is at an address, in order with all reads and writes before and
    after; returns the old."""
    return operation(
        lambda b, at, value: b.atomic_rmw(name, b.pointer(at, I64), value, "seq_cst"),
        types.intp,
        types.intp,
        result=types.intp,
    )


fetch_add, exchange = atomic("add"), atomic("xchg")


def emit_replace(b: Builder, address: ir.Value, old: ir.Value, new: ir.Value) -> ir.Value:
    at = b.pointer(address, I64)
    return b.extract_value(b.cmpxchg(at, old, new, "seq_cst", "seq_cst"), 1)


# Atomically write ``new`` where ``old`` stands; whether it did
replace_if = operation(emit_replace, types.intp, types.intp, types.intp, result=types.boolean)

# What is read afterwards is at least as new; what was added or exchanged before is seen by others
# before this reads. On Arm, "acquire" would not say so.
read_atomic = operation(
    lambda b, at: b.load_atomic(b.pointer(at, I64), "seq_cst", 8), types.intp, result=types.intp
)

# What was read before is not newer than what is read afterwards. x86 never reads in another order.
finish_reads = operation(lambda b: b.fence("acquire"), result=types.void)


def emit_pause(b: Builder) -> None:
    machine = platform.machine()
    if machine in ("x86_64", "AMD64"):
        b.invoke("llvm.x86.sse2.pause", ir.VoidType(), [])
    elif machine in ("aarch64", "arm64"):
        b.invoke("llvm.aarch64.hint", ir.VoidType(), [ir.Constant(I32, 1)])


def emit_give_way(b: Builder) -> None:
    b.invoke("sched_yield", I32, [])


def emit_clock(b: Builder, buffer: ir.Value) -> ir.Value:
    b.invoke("clock_gettime", I32, [ir.Constant(I32, time.CLOCK_MONOTONIC), buffer])
    seconds = b.load_as(buffer, I64, 8)
    return b.add(b.mul(seconds, number(10**9)), b.load_as(b.offset(buffer, 8), I64, 8))


def emit_futex(b: Builder, address: ir.Value, action: ir.Value, value: ir.Value) -> None:
    if FUTEX:
        arguments = [number(FUTEX), address, action, value, number(0), number(0), number(0)]
        b.invoke("syscall", I64, arguments)
    else:
        waits = b.icmp_signed("==", action, number(FUTEX_WAIT))
        b.invoke("usleep", I32, [b.select(waits, ir.Constant(I32, 1000), ir.Constant(I32, 0))])


pause = operation(emit_pause, result=types.void)  # tells the core that this is a spin loop
# Let the operating system run something else on this core, if there is something
give_way = operation(emit_give_way, result=types.void)
# Nanoseconds; at an address lie the two int64 of the C library's answer
clock = operation(emit_clock, types.intp, result=types.intp)
# Sleep while the low 32 bits at an address are a value, or wake as many sleepers. Where the system
# has no futex, a sleep ends by itself after a millisecond.
futex = operation(emit_futex, types.intp, types.intp, types.intp, result=types.void)


@helper
def wait_a_little(turns):
    """One turn of waiting: busily at first, then letting others have the core."""
    if turns < SPINS:
        pause()
    else:
        give_way()
