"""Mailboxes: how programs on several GPUs hand each other numbers, without a barrier or a flag.

Every rank has a *mailbox* in its own memory that all others can write to, over NVLink or PCIe. A
program sends to the same program of the other ranks, and waits for theirs. An empty mailbox is full
of `EMPTY`, which no number sent is; who waits reads until none of it is left, then puts it back.

A mailbox has two halves, which take turns. A rank sends into a half once more only after it has
received what another has sent into the other half, which that one has done after emptying this one;
so nothing is ever written over. Whose turn it is, each program counts on the device: a CUDA graph
can be replayed, and grids of different sizes follow each other. All ranks launch the same ones in
the same order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._C import _distributed_c10d

from ruvon.kernels.mesh import Store

c10d: Any = _distributed_c10d  # whose stubs change from release to release

PROGRAMS = 128
"""At most: they wait for each other across GPUs, so all must fit on one at the same time."""

CAPACITY = 32 << 10  # bytes that a program may send to another in one turn

EMPTY = tl.constexpr(-0x8000)
EMPTY_WIDE = tl.constexpr(-0x7FFF8000)
"""As a 16-bit float -0.0, as float32 (the same, twice) -4.6e-41: either is sent as 0."""


class Mailboxes(NamedTuple):
    """How a rank reaches the others. ``narrow`` and ``wide`` are the mailboxes of all ranks, in
    order, as integers of 16 and of 32 bits: [turn, sender, program, numbers]."""

    rank: int
    size: int
    narrow: tuple[Tensor, ...]
    wide: tuple[Tensor, ...]
    turns: Tensor  # int32, for each program: which half is next
    capacity: int = CAPACITY
    held: object = None  # the memory

    @property
    def programs(self) -> int:
        return self.turns.shape[0]

    def arguments(self, itemsize: int) -> tuple[tuple[Tensor, ...], dict[str, int]]:
        """The mailboxes for numbers of so many bytes, and the constants of a kernel that uses
        them."""
        boxes, empty = (self.narrow, EMPTY) if itemsize == 2 else (self.wide, EMPTY_WIDE)
        room = self.capacity // itemsize
        constants = {"ROOM": room, "SENDER": self.programs * room, "NOTHING": empty.value}
        return boxes, {"RANK": self.rank, "SIZE": self.size, **constants}


@triton.jit
def seal(x, BITS: tl.constexpr, NOTHING: tl.constexpr):
    """As bits that are not those of an empty mailbox."""
    bits = x.to(BITS, bitcast=True)
    return tl.where(bits == NOTHING, 0, bits)


@triton.jit
def receive(at, inside, NOTHING: tl.constexpr):
    """Bits, once they are there; the mailbox is empty afterwards."""
    bits = tl.load(at, mask=inside, other=0, volatile=True)
    while tl.max((bits == NOTHING).to(tl.int32), axis=0) > 0:
        bits = tl.load(at, mask=inside, other=0, volatile=True)
    tl.store(at, tl.full(bits.shape, NOTHING, bits.dtype), mask=inside)
    return bits


@triton.jit
def send(
    bits, boxes, at, inside, row, RANK: tl.constexpr, SIZE: tl.constexpr, TO_ADDER: tl.constexpr
):
    """To all other ranks, or only to the one that adds this row up."""
    for other in tl.static_range(SIZE):
        if other != RANK:
            wanted = inside
            if TO_ADDER:
                wanted = inside & (row % SIZE == other)
            tl.store(boxes[other] + at, bits, mask=wanted)


def make_mailboxes(
    rank: int, boxes: list[Tensor], programs: int = PROGRAMS, held: object = None
) -> Mailboxes:
    """Of the ranks' mailboxes, int32 each and empty, as they are reached from here."""
    narrow = tuple([box.view(torch.int16) for box in boxes])
    turns = torch.zeros(programs, dtype=torch.int32, device=boxes[rank].device)
    capacity = 4 * boxes[rank].shape[0] // (2 * len(boxes) * programs)
    return Mailboxes(rank, len(boxes), narrow, tuple(boxes), turns, capacity, held)


def share_mailboxes(store: Store, name: str, rank: int, size: int) -> Mailboxes:
    """Mailboxes, of the current device; see `share_memory`."""
    count = 2 * size * PROGRAMS * CAPACITY // 4  # of 32 bits
    boxes, held = share_memory(store, name, rank, size, count, EMPTY_WIDE.value)
    return make_mailboxes(rank, boxes, held=held)


def share_memory(
    store: Store, name: str, rank: int, size: int, count: int, value: int
) -> tuple[list[Tensor], object]:
    """(``count`` int32 of each rank, all of them ``value``, in torch's symmetric memory; what holds
    it). Blocks until all ranks have called it, each on its current device.

    Raises RuntimeError where a GPU cannot reach another's memory.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    places = c10d.ProcessGroup(store, rank, size)
    c10d._register_process_group(name, places)  # by which name torch finds it below
    try:
        own = c10d._SymmetricMemory.empty_strided_p2p((count,), (1,), torch.int32, device, name)
        own.fill_(value)
        torch.cuda.synchronize()  # before anybody can write into it
        memory = c10d._SymmetricMemory.rendezvous(own, name)
        parts = [memory.get_buffer(other, (count,), torch.int32) for other in range(size)]
    finally:
        c10d._unregister_process_group(name)
    return parts, (own, memory)
