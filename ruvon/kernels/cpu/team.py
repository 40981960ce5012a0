"""A team of threads that runs a program together: the CPU's answer to a kernel launch.

Every thread walks the whole program (see `program`). An instruction's units of work are cut into
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ruvon.kernels.cpu.layout import aligned_bytes
from ruvon.kernels.cpu.program import (
    CLOCK,
    FETCH_AT,
    FETCH_END,
    FETCH_FOR,
    INSTRUCTION_BYTES,
    OFFERED,
    OWN_END,
    SCRATCH_BYTES,
    Field,
    call_kernel,
    get,
)
from ruvon.kernels.cpu.simd import prefetch, read_i64, write_i64
from ruvon.kernels.cpu.sync import (
    EVERYBODY,
    FUTEX_WAIT,
    FUTEX_WAKE,
    clock,
    exchange,
    fetch_add,
    futex,
    give_way,
    read_atomic,
    replace_if,
    wait_a_little,
)

# The control block, in bytes. What threads write has a cache line to itself.
EPOCH = 0  # programs begun so far
SLEEPING = 64  # threads asleep
STOP = 128
SCRATCH = 136  # address of the threads' scratch space
ORDERS, ORDER_BYTES = 192, 128  # two of them, the newest is number EPOCH % 2
PROGRAM, COUNT, FIRST, PARAMS = 0, 8, 16, 64  # in an order; FIRST numbers its first instruction
COUNTERS = 448  # SLOTS times (a word of parts done, then a word of parts claimed for each thread)
SLOTS = 8

PARTS_EACH = 2  # parts of an instruction that are a thread's own
PART_BITS = 16  # of a counter; above them is the instruction's number
MOST_PARTS = (1 << PART_BITS) - 1

MOST_FETCHED = 1 << 17  # bytes: a part of the second-level cache

MOST_IN_USE = 16  # programs that are kept before it is looked which are still in use
TURNS_BEFORE_SLEEP = 4000
OFFER_EVERY = 1_000_000  # nanoseconds; less than a time slice of the operating system


@njit
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


@njit
def count_done(word, number):
    """One more part is done. Its claim keeps ``number`` the newest meanwhile."""
    seen = read_atomic(word)
    if seen >> PART_BITS == number or not replace_if(word, seen, (number << PART_BITS) + 1):
        fetch_add(word, 1)


@njit
def is_done(word, number, parts):
    seen = read_atomic(word)
    return seen >> PART_BITS > number or seen == (number << PART_BITS) + parts


@njit
def plan_fetching(instruction, thread, threads, units, scratch):
    """Note which tiles this thread will multiply next, unless it began to fetch them before."""
    write_i64(scratch + OWN_END, (thread + 1) * units // threads)
    tiles = get(instruction, Field.NEXT)
    if tiles == read_i64(scratch + FETCH_FOR):
        return
    next_units, size = get(instruction, Field.NEXT_UNITS), get(instruction, Field.NEXT_UNIT_BYTES)
    first, last = thread * next_units // threads, (thread + 1) * next_units // threads
    write_i64(scratch + FETCH_FOR, tiles)
    write_i64(scratch + FETCH_AT, tiles + first * size)
    write_i64(scratch + FETCH_END, tiles + min(last * size, first * size + MOST_FETCHED))


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
def run_parts(control, epoch, instruction, params, number, thread, threads, scratch):
    """This thread's share of one instruction; returns when all of it is done.

    A thread's own parts lie side by side, so that it streams through its weights and meets the
    same ones every step. Who computes a part does not change its result.
    """
    kernel = get(instruction, Field.KERNEL)
    units = get(params, get(instruction, Field.COUNT)) * get(instruction, Field.PER_COUNT)
    if read_atomic(control + EPOCH) != epoch:
        return  # what was read may belong to a newer order
    plan_fetching(instruction, thread, threads, units, scratch)
    counters = control + COUNTERS + number % SLOTS * 64 * (1 + threads)
    own, owners = PARTS_EACH, threads
    if get(instruction, Field.DRAWN):  # all parts are everybody's
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
                call_kernel(kernel, instruction, params, start, stop, scratch)
            count_done(counters, number)
    turns = 0
    while parts and not is_done(counters, number, parts):
        if not fetch_some(scratch, 4):
            wait_a_little(turns)
            turns += 1


@njit
def run_alone(instruction, params, scratch):
    units = get(params, get(instruction, Field.COUNT)) * get(instruction, Field.PER_COUNT)
    if units:
        plan_fetching(instruction, 0, 1, units, scratch)
        call_kernel(get(instruction, Field.KERNEL), instruction, params, 0, units, scratch)


@njit
def offer_core(scratch):
    """Give way if that is due. Where programs compete for the cores, steps then take two thirds
    of the time they took when threads were interrupted with parts in hand."""
    now = clock(scratch + CLOCK)
    if now - read_i64(scratch + OFFERED) > OFFER_EVERY:
        give_way()
        write_i64(scratch + OFFERED, clock(scratch + CLOCK))


@njit
def run_program(control, order, epoch, thread, threads):
    """All instructions of an order, unless a newer one is under way: then this one is done."""
    program, params = read_i64(order + PROGRAM), order + PARAMS
    count, first = read_i64(order + COUNT), read_i64(order + FIRST)
    scratch = read_i64(control + SCRATCH) + thread * SCRATCH_BYTES
    for index in range(count):
        instruction = program + index * INSTRUCTION_BYTES
        if threads == 1:
            run_alone(instruction, params, scratch)
            continue
        if read_atomic(control + EPOCH) != epoch:
            return
        run_parts(control, epoch, instruction, params, first + index, thread, threads, scratch)
        offer_core(scratch)


def lead(control, threads):
    """The calling thread's part: publish the order that was written, run it as thread 0."""
    epoch = fetch_add(control + EPOCH, 1) + 1
    if read_atomic(control + SLEEPING) > 0:
        futex(control + EPOCH, FUTEX_WAKE, EVERYBODY)
    run_program(control, control + ORDERS + ORDER_BYTES * (epoch % 2), epoch, 0, threads)


@njit
def wait_for_order(control, epoch):
    """Spin a little, then sleep, until the epoch moves on from ``epoch``; returns the new one."""
    turns = 0
    while read_atomic(control + EPOCH) == epoch:
        if turns < TURNS_BEFORE_SLEEP:
            wait_a_little(turns)
            turns += 1
        else:
            fetch_add(control + SLEEPING, 1)
            futex(control + EPOCH, FUTEX_WAIT, epoch)
            fetch_add(control + SLEEPING, -1)
    return read_atomic(control + EPOCH)


def follow(control, presence, thread, threads):
    """A parked thread's whole life. ``presence`` tells which program's memory it may look at."""
    epoch = 0
    while True:
        epoch = wait_for_order(control, epoch)
        if read_atomic(control + STOP) != 0:
            return
        exchange(presence, epoch)
        if read_atomic(control + EPOCH) == epoch:  # else that memory may be gone already
            run_program(
                control, control + ORDERS + ORDER_BYTES * (epoch % 2), epoch, thread, threads
            )
        exchange(presence, 0)


class Team:
    """The threads, their scratch space, and the control block they meet at.

    Thread 0 is whoever calls `run`; the others are parked. Each is held to a core of its own where
    the operating system allows that (the caller while it runs, unless it has settled), lest two
    meet on one.
    """

    def __init__(self, threads: int, lead: int, follow: int) -> None:
        """``lead`` and ``follow`` are the addresses of the compiled entries of this file."""
        self.threads = threads
        counters = SLOTS * 64 * (1 + threads)
        control = aligned_bytes(COUNTERS + counters + 64 * threads).view(torch.int64)
        self._control = control.numpy()
        self._presence = self._control[(COUNTERS + counters) // 8 :: 8]
        self._scratch = aligned_bytes(threads * SCRATCH_BYTES)
        self._control[SCRATCH // 8] = self._scratch.data_ptr()
        self._lead = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 2)(lead)
        self._follow = ctypes.CFUNCTYPE(None, *[ctypes.c_ssize_t] * 4)(follow)
        self._address = int(self._control.ctypes.data)
        self._epoch = 0
        self._first = 1  # number of the next program's first instruction
        self._in_use: deque[tuple[int, Tensor]] = deque()
        self._busy = threading.Lock()
        self._cores = cores_for(threads)
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
            assert self.threads, "the team was closed"
            order = self._next_order()
            order[PROGRAM // 8] = program.data_ptr()
            order[COUNT // 8] = program.shape[0]
            order[FIRST // 8] = self._first
            order[PARAMS // 8 : PARAMS // 8 + len(params)] = params
            self._first += program.shape[0]
            self._in_use.append((self._epoch, program))
            self._lead(self._address, self.threads)
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

    def _next_order(self) -> np.ndarray[Any, Any]:
        """The one that no thread reads: of two, the older."""
        self._epoch += 1
        start = (ORDERS + ORDER_BYTES * (self._epoch % 2)) // 8
        return self._control[start : start + ORDER_BYTES // 8]

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
        self._next_order()[COUNT // 8] = 0
        self._lead(self._address, 1)  # nothing to run, but the epoch moves on
        for other in self._others:
            other.join()
        self.threads = 0
        self._busy.release()

    def _park(self, thread: int) -> None:
        presence = self._presence[thread:].ctypes.data
        with held_to(self._cores[thread]):
            self._follow(self._address, presence, thread, self.threads)


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
