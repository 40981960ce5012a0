"""Sums over the ranks of one machine's GPUs, with the residual addition and the norm behind them.

A program takes rows; it puts them into the others' mailboxes (`ruvon.kernels.mailboxes`), waits for
theirs, and adds up in the order of ranks, so all hold the same bits.

*One-shot*: rows go to all ranks, and each adds them up. *Two-shot*, for many rows on more than two
ranks: a row goes to the rank that adds it up, and the sum to all; the same bits, fewer bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.mailboxes import Mailboxes, receive, seal, send
from ruvon.kernels.norm import load_norm, normalize
from ruvon.kernels.pdl import release, wait

ONE_SHOT_BYTES = 256 << 10  # of all rows; on more than two ranks two-shot is faster from there on
LARGEST_ROW = 8192  # columns that a program holds in registers


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
            part = receive(boxes[RANK] + at + sender * SENDER, inside, NOTHING)
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
    weight, bias = load_norm(weight_ptr, bias_ptr, columns, inside)
    wait(PDL)
    turn = tl.load(turns_ptr + program)
    first = turn * SIZE * SENDER + program * ROOM + columns  # of what the first rank has sent
    at, line = first, program.to(tl.int64)
    for row in range(program, num_rows, programs):  # all is under way before anybody waits
        x = tl.load(x_ptr + line * x_stride + columns, mask=inside, other=0.0)
        bits = seal(x, BITS, NOTHING)
        send(bits, boxes, at + RANK * SENDER, inside, row, RANK, SIZE, TWO_SHOT)
        at += num_columns
        line += programs
    at, line = first, program.to(tl.int64)
    for row in range(program, num_rows, programs):
        x = tl.load(x_ptr + line * x_stride + columns, mask=inside, other=0.0)
        bits = seal(x, BITS, NOTHING)
        if TWO_SHOT:
            adder = row % SIZE
            if adder == RANK:
                x = _add_up(bits, boxes, at, inside, dtype, SENDER, NOTHING, RANK, SIZE)
                bits = seal(x, BITS, NOTHING)
                send(bits, boxes, at + RANK * SENDER, inside, row, RANK, SIZE, False)
            else:
                bits = receive(boxes[RANK] + at + adder * SENDER, inside, NOTHING)
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


def fits(rows: int, columns: int, itemsize: int, boxes: Mailboxes) -> bool:
    """Whether there is room for as many rows, of that size."""
    each = triton.cdiv(rows, boxes.programs) * columns * itemsize
    return rows > 0 and columns <= LARGEST_ROW and each <= boxes.capacity


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
    mail, constants = boxes.arguments(x_TC.itemsize)
    block = triton.next_power_of_2(columns)
    _sum_kernel[(min(rows, boxes.programs),)](
        x_TC,
        residual_TC,
        weight_C,
        bias_C,
        normed_TC,
        total_TC,
        mail,
        boxes.turns,
        rows,
        columns,
        x_TC.stride(0),
        eps,
        BLOCK=block,
        HAS_RESIDUAL=residual_TC is not None,
        NORM=weight_C is not None,
        CENTERED=bias_C is not None,
        TWO_SHOT=boxes.size > 2 and x_TC.nbytes > ONE_SHOT_BYTES,
        PDL=pdl,
        **constants,
        num_warps=min(max(block // 512, 4), 16),
        launch_pdl=pdl,
    )
    return normed_TC, total_TC
