"""Columns of all ranks side by side, through the mailboxes of one machine's GPUs: logits."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.mailboxes import Mailboxes, receive, seal, send
from ruvon.kernels.pdl import release, wait

COLUMNS = 2048  # that a program moves at a time


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
        bits = seal(x, BITS, NOTHING)
        send(bits, boxes, at + RANK * SENDER, inside, 0, RANK, SIZE, False)
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
                bits = seal(x, BITS, NOTHING)
            else:
                bits = receive(boxes[RANK] + at + sender * SENDER, inside, NOTHING)
            tl.store(out, bits.to(dtype, bitcast=True), mask=inside)
            out += widths[sender]
        at += BLOCK
        tile += programs
    tl.store(turns_ptr + program, 1 - turn)


def most_rows(widths: Sequence[int], itemsize: int, boxes: Mailboxes) -> int:
    """For how many at once there is room."""
    tiles = boxes.programs * (boxes.capacity // (COLUMNS * itemsize))
    return int(tiles // triton.cdiv(max(widths), COLUMNS))


def gather_ranks(
    x_TC: Tensor, widths: Sequence[int], boxes: Mailboxes, pdl: bool = False
) -> Tensor:
    """The columns of all ranks side by side; ``widths`` are how many each has."""
    out_TC = x_TC.new_empty(x_TC.shape[0], sum(widths))
    some = most_rows(widths, x_TC.itemsize, boxes)
    for x, out in zip(x_TC.split(some), out_TC.split(some), strict=True):
        _gather(x, widths, out, boxes, pdl)
    return out_TC


def _gather(
    x_TC: Tensor, widths: Sequence[int], out_TC: Tensor, boxes: Mailboxes, pdl: bool
) -> None:
    rows, row_tiles = x_TC.shape[0], triton.cdiv(max(widths), COLUMNS)
    mail, constants = boxes.arguments(x_TC.itemsize)
    _gather_kernel[(min(rows * row_tiles, boxes.programs),)](
        x_TC,
        out_TC,
        mail,
        boxes.turns,
        tuple(widths),
        rows * row_tiles,
        row_tiles,
        x_TC.stride(0),
        out_TC.stride(0),
        BLOCK=COLUMNS,
        PDL=pdl,
        **constants,
        launch_pdl=pdl,
    )
