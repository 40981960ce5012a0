"""Rows of activations as whole numbers, for products of one or two of them with weights kept as
codes.

A group's columns become 16 bits each, in units of its largest magnitude, which is finer than
bfloat16 is for that one: two signed digits to the base 256, which an instruction multiplies by four
codes at a time. A launch of its own does this once, after the norm: each of a product's programs
doing it took longer than the product. It is one program where the whole row has to be normed first,
else several.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.norm import Norm, load_norm, normalize
from ruvon.kernels.pdl import release, wait

SLICE = 2048  # columns of one program


class Digits(NamedTuple):
    """Of four columns the high digits, then the low ones, where they are ``paired``; else a row's
    high digits, then its low ones. Likewise a group's unit, and the sum of its columns."""

    digits_TK: Tensor  # int8 [T, 2 * columns]
    tables_TU: Tensor  # float32 [T, 2 * groups]


@triton.jit
def _larger(a, b):
    """What is no number is the largest: else a row would come out as if it were not there."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _quantize_kernel(
    x_ptr, residual_ptr, gain_ptr, shift_ptr, total_ptr, digits_ptr, tables_ptr,
    K, x_stride, num_digits, num_units, eps,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of ``WIDTH`` columns is 32512, so that no digit is too large."""
    release(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = part * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = columns < K
    gain, shift = load_norm(gain_ptr, shift_ptr, columns, inside)
    wait(PDL)
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x = x + tl.load(residual_ptr + row * K + columns, mask=inside, other=0.0)
        tl.store(total_ptr + row * K + columns, x, mask=inside)
    wide = x.to(tl.float32)
    if NORM > 0:
        wide = normalize(x, gain, shift, inside, K, eps, NORM == 2).to(x.dtype).to(tl.float32)
    UNITS: tl.constexpr = BLOCK_K // WIDTH
    wide = tl.reshape(wide, (UNITS, WIDTH))
    most = _larger(tl.reduce(tl.abs(wide), 1, _larger), 1e-30)
    whole = tl.floor(wide * (32512.0 / most)[:, None] + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    units = part * UNITS + tl.arange(0, UNITS)
    at = units[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    used = at < num_digits
    digit_at = digits_ptr + row * 2 * num_digits + (at // 4 * 8 + at % 4 if PAIRED else at)
    tl.store(digit_at, high.to(tl.int8), mask=used)
    low_at = digit_at + (4 if PAIRED else num_digits)
    tl.store(low_at, (whole - high * 256).to(tl.int8), mask=used)
    table_at = tables_ptr + row * 2 * num_units + units * (2 if PAIRED else 1)
    tl.store(table_at, most / 32512.0, mask=units < num_units)
    sum_at = table_at + (1 if PAIRED else num_units)
    tl.store(sum_at, tl.sum(wide, axis=1), mask=units < num_units)


def quantize(
    x_TK: Tensor,
    residual_TK: Tensor | None,
    norm: Norm | None,
    width: int,
    columns: int,
    paired: bool,
    pdl: bool,
) -> tuple[Tensor, Digits]:
    """(x + residual, its norm by groups of ``width``, in so many ``columns``, the last zeros)."""
    rows, k = x_TK.shape
    digits = torch.empty(rows, 2 * columns, dtype=torch.int8, device=x_TK.device)
    tables = torch.empty(rows, 2 * (columns // width), dtype=torch.float32, device=x_TK.device)
    total_TK = x_TK if residual_TK is None else torch.empty_like(x_TK)
    block = triton.next_power_of_2(columns)
    if norm is None and residual_TK is None:
        block = min(block, SLICE)
    _quantize_kernel[(rows, triton.cdiv(columns, block))](
        x_TK,
        residual_TK,
        norm.weight_C if norm else None,
        norm.bias_C if norm else None,
        total_TK,
        digits,
        tables,
        k,
        x_TK.stride(0),
        columns,
        columns // width,
        norm.eps if norm else 0.0,
        NORM=0 if norm is None else 1 if norm.bias_C is None else 2,
        HAS_RESIDUAL=residual_TK is not None,
        WIDTH=width,
        PAIRED=paired,
        BLOCK_K=block,
        PDL=pdl,
        num_warps=max(1, min(8, block // 256)),
        launch_pdl=pdl,
    )
    return total_TK, Digits(digits, tables)


@triton.jit
def add_dot(sums, a, b, NATIVE: tl.constexpr):
    """``sums`` plus the products of two words' four signed bytes, exactly."""
    if NATIVE:
        sums = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, sums],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        sums += (a >> 24) * (b >> 24)
        for byte in tl.static_range(3):
            sums += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    return sums
