"""Sums over the ranks of one machine's GPUs, with the residual addition and the norm behind them.

Every rank has a *mailbox* that all others can write to, over NVLink or PCIe. A program takes rows;
it sends them to the same program of the other ranks, waits for theirs, and adds up in the order of
ranks, so all hold the same bits. There is no barrier and no flag: an empty mailbox is full of
`EMPTY`, which no number sent is, and who waits reads until none of it is left, then puts it back.

A mailbox has two halves, which take turns. A rank sends what belongs into the half that another has
just emptied only after it has heard from it once more, so nothing is ever written over. Whose turn
it is, each program counts on the device: a CUDA graph can be replayed, and grids of different sizes
follow each other.

*One-shot*: rows go to all ranks, and each adds them up. *Two-shot*, for many rows on more than two
ranks: a row goes to the rank that adds it up, and the sum to all; the same bits, fewer bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.mesh import Mesh, Store
from ruvon.kernels.norm import add_norm, normalize
from ruvon.kernels.pdl import release, supports_pdl, wait

PROGRAMS = 128
"""At most: they wait for each other across GPUs, so all must fit on one at the same time."""

CAPACITY = 32 << 10  # bytes that a program may send to another in one turn
ONE_SHOT_BYTES = 256 << 10  # of all rows; on more than two ranks two-shot is faster from there on
LARGEST_ROW = 8192  # columns that a program holds in registers
GATHERED = 2048  # columns that one gathers at a time

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
    turns: Tensor  # int32 [PROGRAMS]: which half is next
    held: object = None  # the memory


def _empty(numbers: Tensor) -> int:
    return int(EMPTY.value if numbers.itemsize == 2 else EMPTY_WIDE.value)


@triton.jit
def _seal(x, BITS: tl.constexpr, NOTHING: tl.constexpr):
    """As bits that are not those of an empty mailbox."""
    bits = x.to(BITS, bitcast=True)
    return tl.where(bits == NOTHING, 0, bits)


@triton.jit
def _receive(at, inside, NOTHING: tl.constexpr):
    """Bits, once they are there; the mailbox is empty afterwards."""
    bits = tl.load(at, mask=inside, other=0, volatile=True)
    while tl.max((bits == NOTHING).to(tl.int32), axis=0) > 0:
        bits = tl.load(at, mask=inside, other=0, volatile=True)
    tl.store(at, tl.full(bits.shape, NOTHING, bits.dtype), mask=inside)
    return bits


@triton.jit
def _send(
    bits, boxes, at, inside, row, RANK: tl.constexpr, SIZE: tl.constexpr, TO_ADDER: tl.constexpr
):
    """To all other ranks, or only to the one that adds this row up."""
    for other in tl.static_range(SIZE):
        if other != RANK:
            wanted = inside
            if TO_ADDER:
                wanted = inside & (row % SIZE == other)
            tl.store(boxes[other] + at, bits, mask=wanted)


@triton.jit
def _add_up(
    bits, boxes, at, inside, dtype: tl.constexpr, SENDER: tl.constexpr, NOTHING: tl.constexpr,
    RANK: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The sum of what all ranks have, ``bits`` being this one's. ``at`` is where the first one's
    are put, ``SENDER`` numbers before the next one's."""
    total = tl.zeros(bits.shape, tl.float32)
    for sender in tl.static_range(SIZE):
        part = bits
        if sender != RANK:
            part = _receive(boxes[RANK] + at + sender * SENDER, inside, NOTHING)
        total += part.to(dtype, bitcast=True).to(tl.float32)
    return total.to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, total_ptr,
    boxes, turns_ptr, num_rows, num_columns, x_stride, eps,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NORM: tl.constexpr, CENTERED: tl.constexpr,
    RANK: tl.constexpr, SIZE: tl.constexpr, TWO_SHOT: tl.constexpr, ROOM: tl.constexpr,
    SENDER: tl.constexpr, NOTHING: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    BITS: tl.constexpr = boxes[0].dtype.element_ty
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    weight = tl.zeros([BLOCK], tl.float32)
    if NORM:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = weight
    if CENTERED:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    turn = tl.load(turns_ptr + program)
    first = turn * SIZE * SENDER + program * ROOM + columns  # of what the first rank has sent
    at, line = first, program.to(tl.int64)
    for row in range(program, num_rows, programs):  # all is under way before anybody waits
        x = tl.load(x_ptr + line * x_stride + columns, mask=inside, other=0.0)
        bits = _seal(x, BITS, NOTHING)
        _send(bits, boxes, at + RANK * SENDER, inside, row, RANK, SIZE, TWO_SHOT)
        at += num_columns
        line += programs
    at, line = first, program.to(tl.int64)
    for row in range(program, num_rows, programs):
        x = tl.load(x_ptr + line * x_stride + columns, mask=inside, other=0.0)
        bits = _seal(x, BITS, NOTHING)
        if TWO_SHOT:
            adder = row % SIZE
            if adder == RANK:
                x = _add_up(bits, boxes, at, inside, dtype, SENDER, NOTHING, RANK, SIZE)
                bits = _seal(x, BITS, NOTHING)
                _send(bits, boxes, at + RANK * SENDER, inside, row, RANK, SIZE, False)
            else:
                bits = _receive(boxes[RANK] + at + adder * SENDER, inside, NOTHING)
            x = bits.to(dtype, bitcast=True)
        else:
            x = _add_up(bits, boxes, at, inside, dtype, SENDER, NOTHING, RANK, SIZE)
        out = line * num_columns + columns
        if HAS_RESIDUAL:
            x = x + tl.load(residual_ptr + out, mask=inside, other=0.0)
        tl.store(total_ptr + out, x, mask=inside)
        if NORM:
            normed = normalize(x, weight, bias, inside, num_columns, eps, CENTERED)
            tl.store(normed_ptr + out, normed.to(dtype), mask=inside)
        at += num_columns
        line += programs
    tl.store(turns_ptr + program, 1 - turn)


def fits(x_TC: Tensor) -> bool:
    """Whether there is room for as many rows, of that size."""
    rows, columns = x_TC.shape
    each = triton.cdiv(rows, PROGRAMS) * columns * x_TC.itemsize
    return rows > 0 and columns <= LARGEST_ROW and each <= CAPACITY


def sum_ranks(x_TC: Tensor, boxes: Mailboxes, pdl: bool = False) -> Tensor:
    """The sum of all ranks' x."""
    return _launch(x_TC, None, None, None, 0.0, boxes, pdl)[1]


def sum_add_norm(
    x_TC: Tensor,
    residual_TC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor | None,
    eps: float,
    boxes: Mailboxes,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """`ruvon.kernels.norm.add_norm` of the sum of all ranks' x."""
    return _launch(x_TC, residual_TC, weight_C, bias_C, eps, boxes, pdl)


def _launch(
    x_TC: Tensor,
    residual_TC: Tensor | None,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    eps: float,
    boxes: Mailboxes,
    pdl: bool,
) -> tuple[Tensor, Tensor]:
    rows, columns = x_TC.shape
    total_TC = torch.empty(rows, columns, dtype=x_TC.dtype, device=x_TC.device)
    normed_TC = total_TC if weight_C is None else torch.empty_like(total_TC)
    room = CAPACITY // x_TC.itemsize
    block = triton.next_power_of_2(columns)
    _sum_kernel[(min(rows, PROGRAMS),)](
        x_TC,
        residual_TC,
        weight_C,
        bias_C,
        normed_TC,
        total_TC,
        boxes.narrow if x_TC.itemsize == 2 else boxes.wide,
        boxes.turns,
        rows,
        columns,
        x_TC.stride(0),
        eps,
        BLOCK=block,
        HAS_RESIDUAL=residual_TC is not None,
        NORM=weight_C is not None,
        CENTERED=bias_C is not None,
        RANK=boxes.rank,
        SIZE=boxes.size,
        TWO_SHOT=boxes.size > 2 and x_TC.nbytes > ONE_SHOT_BYTES,
        ROOM=room,
        SENDER=PROGRAMS * room,
        NOTHING=_empty(x_TC),
        PDL=pdl,
        num_warps=min(max(block // 512, 4), 16),
        launch_pdl=pdl,
    )
    return normed_TC, total_TC


@triton.jit(do_not_specialize=["num_tiles", "row_tiles"])
def _gather_kernel(
    x_ptr, out_ptr, boxes, turns_ptr, widths, num_tiles, row_tiles, x_stride, out_stride,
    BLOCK: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    SENDER: tl.constexpr, NOTHING: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    program, programs = tl.program_id(0), tl.num_programs(0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    BITS: tl.constexpr = boxes[0].dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    wait(PDL)
    turn = tl.load(turns_ptr + program)
    first = turn * SIZE * SENDER + program * ROOM + lanes
    at, tile = first, program.to(tl.int64)
    for _ in range(program, num_tiles, programs):
        columns = tile % row_tiles * BLOCK + lanes
        inside = columns < widths[RANK]
        x = tl.load(x_ptr + tile // row_tiles * x_stride + columns, mask=inside, other=0.0)
        bits = _seal(x, BITS, NOTHING)
        _send(bits, boxes, at + RANK * SENDER, inside, 0, RANK, SIZE, False)
        at += BLOCK
        tile += programs
    at, tile = first, program.to(tl.int64)
    for _ in range(program, num_tiles, programs):
        row, columns = tile // row_tiles, tile % row_tiles * BLOCK + lanes
        out = out_ptr + row * out_stride + columns
        for sender in tl.static_range(SIZE):
            inside = columns < widths[sender]
            if sender == RANK:
                x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
                bits = _seal(x, BITS, NOTHING)
            else:
                bits = _receive(boxes[RANK] + at + sender * SENDER, inside, NOTHING)
            tl.store(out, bits.to(dtype, bitcast=True), mask=inside)
            out += widths[sender]
        at += BLOCK
        tile += programs
    tl.store(turns_ptr + program, 1 - turn)


def fits_gather(x_TC: Tensor, widths: Sequence[int]) -> bool:
    """Whether there is room for all parts."""
    tiles = x_TC.shape[0] * triton.cdiv(max(widths), GATHERED)
    return 0 < triton.cdiv(tiles, PROGRAMS) * GATHERED * x_TC.itemsize <= CAPACITY


def gather_ranks(
    x_TC: Tensor, widths: Sequence[int], boxes: Mailboxes, pdl: bool = False
) -> Tensor:
    """The columns of all ranks side by side; ``widths`` are how many each has."""
    rows, room = x_TC.shape[0], CAPACITY // x_TC.itemsize
    out_TC = torch.empty(rows, sum(widths), dtype=x_TC.dtype, device=x_TC.device)
    row_tiles = triton.cdiv(max(widths), GATHERED)
    _gather_kernel[(min(rows * row_tiles, PROGRAMS),)](
        x_TC,
        out_TC,
        boxes.narrow if x_TC.itemsize == 2 else boxes.wide,
        boxes.turns,
        tuple(widths),
        rows * row_tiles,
        row_tiles,
        x_TC.stride(0),
        out_TC.stride(0),
        BLOCK=GATHERED,
        RANK=boxes.rank,
        SIZE=boxes.size,
        ROOM=room,
        SENDER=PROGRAMS * room,
        NOTHING=_empty(x_TC),
        PDL=pdl,
        launch_pdl=pdl,
    )
    return out_TC


def mailbox_numbers(size: int) -> int:
    """Of 32 bits, in the mailbox of each of ``size`` ranks."""
    return 2 * size * PROGRAMS * CAPACITY // 4


def make_mailboxes(rank: int, boxes: list[Tensor], held: object = None) -> Mailboxes:
    """Of the ranks' mailboxes, int32 each and empty, as they are reached from here."""
    narrow = tuple(box.view(torch.int16) for box in boxes)
    turns = torch.zeros(PROGRAMS, dtype=torch.int32, device=boxes[rank].device)
    return Mailboxes(rank, len(boxes), narrow, tuple(boxes), turns, held)


def share_mailboxes(store: Store, name: str, rank: int, size: int) -> Mailboxes:
    """Mailboxes in torch's symmetric memory, of the current device. Blocks until all ranks have
    called it.

    Raises RuntimeError where a GPU cannot reach another's memory.
    """
    from torch._C import _distributed_c10d as c10d

    device, count = torch.device("cuda", torch.cuda.current_device()), mailbox_numbers(size)
    places: Any = dist.ProcessGroup(store, rank, size)  # type: ignore[call-arg, arg-type]
    c10d._register_process_group(name, places)  # by which name torch finds it below
    try:
        own = c10d._SymmetricMemory.empty_strided_p2p((count,), (1,), torch.int32, device, name)
        own.fill_(EMPTY_WIDE.value)
        torch.cuda.synchronize()  # before anybody can write into it
        memory = c10d._SymmetricMemory.rendezvous(own, name)
        boxes = [memory.get_buffer(other, (count,), torch.int32) for other in range(size)]
    finally:
        c10d._unregister_process_group(name)
    return make_mailboxes(rank, boxes, (own, memory))


def over_memory(mesh: Mesh, store: Store, device: torch.device) -> Mesh:
    """The same mesh, whose ranks are GPUs of one machine: sums that fit go through mailboxes.

    If any rank does not reach all others' memory, none of them can: raises RuntimeError on all.
    """
    if mesh.size == 1:
        return mesh
    name, boxes, error = f"ruvon-stage{mesh.stage}", None, None
    within = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    try:
        boxes = share_mailboxes(within, name, mesh.rank, mesh.size)
    except RuntimeError as caught:
        error = caught
    reached = mesh.reduce(torch.full((1, 1), float(boxes is not None), device=device)).item()
    if boxes is None or reached < mesh.size:
        raise RuntimeError("a GPU does not reach the memory of all others") from error
    return _through(mesh, boxes, supports_pdl(device))


def _through(mesh: Mesh, boxes: Mailboxes, pdl: bool) -> Mesh:
    def reduce(x: Tensor) -> Tensor:
        return sum_ranks(x, boxes, pdl) if fits(x) else mesh.reduce(x)

    def sum_norm(
        x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        if fits(x):
            return sum_add_norm(x, residual, weight, bias, eps, boxes, pdl)
        return add_norm(mesh.reduce(x), residual, weight, bias, eps, pdl)

    def gather(x: Tensor, widths: Sequence[int]) -> Tensor:
        fit = fits_gather(x, widths)
        return gather_ranks(x, widths, boxes, pdl) if fit else mesh.gather(x, widths)

    return replace(mesh, reduce=reduce, gather=gather, add_norm=sum_norm)
