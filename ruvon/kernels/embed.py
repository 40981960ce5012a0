"""Rows out of tables, and the sum of two: the small moves around the layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, empty_like

from ruvon.kernels.codes import take_rows
from ruvon.kernels.ops import Packed
from ruvon.kernels.pdl import release, wait


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])  # they may begin anywhere
def _gather_rows_kernel(
    table_ptr,
    rows_ptr,
    out_ptr,
    num_columns,
    first,
    num_rows,
    BLOCK: tl.constexpr,
    CUT: tl.constexpr,
    PDL: tl.constexpr,
):
    out_row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    wait(PDL)
    release(PDL)  # not before: see ruvon.kernels.pdl
    row = tl.load(rows_ptr + out_row).to(tl.int64)
    if CUT:
        row -= first
        there = (row >= 0) & (row < num_rows)
        row = tl.where(there, row, 0)
    values = tl.load(table_ptr + row * num_columns + columns, mask=inside)
    if CUT:
        values = tl.where(there, values, 0.0)
    tl.store(out_ptr + out_row * num_columns + columns, values, mask=inside)


@triton.jit
def _add_kernel(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    release(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    wait(PDL)
    x = tl.load(x_ptr + at, mask=inside)
    y = tl.load(y_ptr + at, mask=inside)
    tl.store(out_ptr + at, x + y, mask=inside)


def gather_rows(
    x_TC: Tensor, rows_L: Tensor, pdl: bool = False, first: int | None = None
) -> Tensor:
    """``x[rows]``. A row index out of range is the caller's mistake and is not caught; unless there
    is a ``first``, which is the index of x's first row: then others give zeros."""
    columns = x_TC.shape[1]
    out_LC = x_TC.new_empty(rows_L.shape[0], columns)
    _gather_rows_kernel[(rows_L.shape[0],)](
        x_TC,
        rows_L,
        out_LC,
        columns,
        first or 0,
        x_TC.shape[0],
        BLOCK=triton.next_power_of_2(columns),
        CUT=first is not None,
        PDL=pdl,
        launch_pdl=pdl,
    )
    return out_LC


def embed(
    ids_T: Tensor,
    table: Packed,
    first: int | None = None,
    *,
    dtype: torch.dtype,
    pdl: bool = False,
) -> Tensor:
    if table.kind != "dense":
        return take_rows(table, ids_T, dtype, pdl, first)
    return gather_rows(table.tensors[0], ids_T, pdl, first)


def add(x_TC: Tensor, y_TC: Tensor, pdl: bool = False) -> Tensor:
    out_TC = empty_like(x_TC)
    grid = (triton.cdiv(x_TC.numel(), 1024),)
    _add_kernel[grid](x_TC, y_TC, out_TC, x_TC.numel(), BLOCK=1024, PDL=pdl, launch_pdl=pdl)
    return out_TC
