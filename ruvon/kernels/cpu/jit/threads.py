"""What each thread does, see `ruvon.kernels.cpu.thread_pool`: claim parts, run them, wait.

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

from ruvon.kernels.cpu import thread_pool as pool
from ruvon.kernels.cpu.arguments import INSTRUCTION_BYTES, Header
from ruvon.kernels.cpu.jit.llvm import I32, I64, Builder, number
from ruvon.kernels.cpu.jit.simd import arguments, get, operation, prefetch, read_i64, write_i64
from ruvon.kernels.cpu.jit.translate import helper
from ruvon.kernels.cpu.params import SCRATCH_BYTES, Note, Param

PARTS_EACH = 2  # parts of an instruction that are a thread's own
PART_BITS = 16  # of a counter; above them is the instruction's number
MOST_PARTS = (1 << PART_BITS) - 1

MOST_FETCHED = 1 << 17  # bytes: a part of the second-level cache
MOST_OF_CACHE = 1 << 21  # bytes of keys and values: a part of the third-level cache

TURNS_BEFORE_SLEEP = 4000
OFFER_EVERY = 1_000_000  # nanoseconds; less than a time slice of the operating system
SPINS = 2000  # of some 20 ns, before a waiting thread gives way at each further turn
FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), 0) if sys.platform == "linux" else 0
FUTEX_WAIT, FUTEX_WAKE, EVERYBODY = 128, 129, 1 << 30  # the private kind

HEADER_BYTES = 8 * len(Header._fields)

# Atomics, waiting, sleeping


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


# Parts of instructions


def emit_call(b: Builder, kernel: ir.Value, *arguments: ir.Value) -> None:
    b.call(b.pointer(kernel, ir.FunctionType(ir.VoidType(), [I64] * len(arguments))), arguments)


# (kernel, arguments, params, start, stop, scratch): call the C function at an address
call_kernel = operation(emit_call, *(types.intp,) * 6, result=types.void)


@helper
def claim(word, number, parts):
    """The next unclaimed part of ``parts`` counted at ``word``; -1 if there is none."""
    while True:
        seen = read_atomic(word)
        newest = seen >> PART_BITS
        claimed = seen & MOST_PARTS if newest == number else 0
        if newest > number or claimed == parts:
            return -1
        if replace_if(word, seen, (number << PART_BITS) + claimed + 1):
            return claimed


@helper
def count_done(word, number):
    """One more part is done. Its claim keeps ``number`` the newest meanwhile."""
    seen = read_atomic(word)
    if seen >> PART_BITS == number or not replace_if(word, seen, (number << PART_BITS) + 1):
        fetch_add(word, 1)


@helper
def is_done(word, number, parts):
    seen = read_atomic(word)
    return seen >> PART_BITS > number or seen == (number << PART_BITS) + parts


@helper
def plan_fetching(header, thread, threads, units, scratch):
    """Note which tiles this thread will multiply next, unless it began to fetch them before."""
    write_i64(scratch + Note.OWN_END, (thread + 1) * units // threads)
    tiles, size = header.next_tiles, header.next_unit_bytes
    if tiles == read_i64(scratch + Note.FETCH_FOR):
        return
    first, last = (
        thread * header.next_units // threads,
        (thread + 1) * header.next_units // threads,
    )
    write_i64(scratch + Note.FETCH_FOR, tiles)
    write_i64(scratch + Note.FETCH_AT, tiles + first * size)
    write_i64(scratch + Note.FETCH_END, tiles + min(last * size, first * size + MOST_FETCHED))


@helper
def plan_cache(header, params, thread, threads, scratch):
    """Note whose keys and values this thread will fetch for the next attention, unless it began to
    before. Sequences are attended from the last one down, by whoever is free."""
    if header.next_attention == read_i64(scratch + Note.CACHE_FOR):
        return
    write_i64(scratch + Note.CACHE_FOR, header.next_attention)
    write_i64(scratch + Note.CACHE_SEQUENCE, get(params, Param.SEQUENCES) - 1 - thread)
    write_i64(scratch + Note.CACHE_TURN, threads)
    write_i64(scratch + Note.CACHE_BLOCK, 0)
    write_i64(scratch + Note.CACHE_INSIDE, 0)
    write_i64(scratch + Note.CACHE_LEFT, MOST_OF_CACHE)


@helper
def fetch_some(scratch, lines):
    """Ask for the next few cache lines of what was planned; False if there are none left."""
    at = read_i64(scratch + Note.FETCH_AT)
    if at >= read_i64(scratch + Note.FETCH_END):
        return False
    for line in range(lines):
        prefetch(at + 64 * line)
    write_i64(scratch + Note.FETCH_AT, at + 64 * lines)
    return True


@helper
def run_parts(control, epoch, instruction, params, number, thread, threads, scratch):
    """This thread's share of one instruction; returns when all of it is done.

    A thread's own parts lie side by side, so that it streams through its weights and meets the
    same ones every step. Who computes a part does not change its result.
    """
    header, told = arguments(Header, instruction), instruction + HEADER_BYTES
    units = get(params, header.counted) * header.units
    finish_reads()
    if read_atomic(control + pool.EPOCH) != epoch:
        return  # what was read may belong to a newer job
    plan_fetching(header, thread, threads, units, scratch)
    plan_cache(header, params, thread, threads, scratch)
    counters = control + pool.COUNTERS + number % pool.SLOTS * 64 * (1 + threads)
    own, owners = PARTS_EACH, threads
    if header.dynamic:  # all parts are everybody's
        own, owners, thread = min(units, MOST_PARTS), 1, 0
    parts = own * owners
    for turn in range(owners):
        owner = (thread + turn) % owners
        while True:
            part = claim(counters + 64 * (1 + owner), number, own)
            if part < 0:
                break
            part += owner * own
            start, stop = part * units // parts, (part + 1) * units // parts
            if start < stop:
                call_kernel(header.kernel, told, params, start, stop, scratch)
            count_done(counters, number)
    turns = 0
    while parts and not is_done(counters, number, parts):
        if not fetch_some(scratch, 4):
            wait_a_little(turns)
            turns += 1


@helper
def run_alone(instruction, params, scratch):
    header, told = arguments(Header, instruction), instruction + HEADER_BYTES
    units = get(params, header.counted) * header.units
    if units:
        plan_fetching(header, 0, 1, units, scratch)
        plan_cache(header, params, 0, 1, scratch)
        call_kernel(header.kernel, told, params, 0, units, scratch)


@helper
def offer_core(scratch):
    """Give way if that is due. Where programs compete for the cores, steps then take two thirds
    of the time they took when threads were interrupted with parts in hand."""
    now = clock(scratch + Note.CLOCK)
    if now - read_i64(scratch + Note.OFFERED) > OFFER_EVERY:
        give_way()
        write_i64(scratch + Note.OFFERED, clock(scratch + Note.CLOCK))


@helper
def run_job(control, epoch, thread, threads):
    """All instructions of a job, unless a newer one is under way: then this one is done."""
    job = control + pool.JOBS + pool.JOB_BYTES * (epoch % 2)
    program, params = read_i64(job + pool.PROGRAM), job + pool.PARAMS
    count, first = read_i64(job + pool.COUNT), read_i64(job + pool.FIRST)
    scratch = read_i64(control + pool.SCRATCH) + thread * SCRATCH_BYTES
    for index in range(count):
        instruction = program + index * INSTRUCTION_BYTES
        if threads == 1:
            run_alone(instruction, params, scratch)
            continue
        if read_atomic(control + pool.EPOCH) != epoch:
            return
        run_parts(control, epoch, instruction, params, first + index, thread, threads, scratch)
        offer_core(scratch)


def lead(control, threads):
    """The calling thread's part: publish the job that was written, run it as thread 0."""
    epoch = fetch_add(control + pool.EPOCH, 1) + 1
    if read_atomic(control + pool.SLEEPING) > 0:
        futex(control + pool.EPOCH, FUTEX_WAKE, EVERYBODY)
    run_job(control, epoch, 0, threads)


@helper
def wait_for_job(control, epoch):
    """Spin a little, then sleep, until the epoch moves on from ``epoch``; returns the new one."""
    turns = 0
    while read_atomic(control + pool.EPOCH) == epoch:
        if turns < TURNS_BEFORE_SLEEP:
            wait_a_little(turns)
            turns += 1
        else:
            fetch_add(control + pool.SLEEPING, 1)
            futex(control + pool.EPOCH, FUTEX_WAIT, epoch)
            fetch_add(control + pool.SLEEPING, -1)
    return read_atomic(control + pool.EPOCH)


def work(control, presence, thread, threads):
    """A parked thread's whole life. ``presence`` tells which program's memory it may look at."""
    epoch = 0
    while True:
        epoch = wait_for_job(control, epoch)
        if read_atomic(control + pool.STOP) != 0:
            return
        exchange(presence, epoch)
        if read_atomic(control + pool.EPOCH) == epoch:  # else that memory may be gone already
            run_job(control, epoch, thread, threads)
        exchange(presence, 0)
