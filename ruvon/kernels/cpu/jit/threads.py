"""What each thread does, see `ruvon.kernels.cpu.thread_pool`: claim parts, run them, wait."""

from __future__ import annotations

from llvmlite import ir
from numba import types

from ruvon.kernels.cpu import thread_pool as pool
from ruvon.kernels.cpu.arguments import INSTRUCTION_BYTES, Header
from ruvon.kernels.cpu.jit.llvm import I64, Builder
from ruvon.kernels.cpu.jit.simd import arguments, get, operation, prefetch, read_i64, write_i64
from ruvon.kernels.cpu.jit.sync import (
    EVERYBODY,
    FUTEX_WAIT,
    FUTEX_WAKE,
    clock,
    exchange,
    fetch_add,
    finish_reads,
    futex,
    give_way,
    read_atomic,
    replace_if,
    wait_a_little,
)
from ruvon.kernels.cpu.jit.translate import helper
from ruvon.kernels.cpu.params import SCRATCH_BYTES, Note, Param

PARTS_EACH = 2  # parts of an instruction that are a thread's own
PART_BITS = 16  # of a counter; above them is the instruction's number
MOST_PARTS = (1 << PART_BITS) - 1

MOST_FETCHED = 1 << 17  # bytes: a part of the second-level cache
MOST_OF_CACHE = 1 << 21  # bytes of keys and values: a part of the third-level cache

TURNS_BEFORE_SLEEP = 4000
OFFER_EVERY = 1_000_000  # nanoseconds; less than a time slice of the operating system


HEADER_BYTES = 8 * len(Header._fields)


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
