"""Products of one or two rows and a weight kept as codes (see `ruvon.kernels.codes`).

As `ruvon.kernels.gemv`, but by whole numbers: a row becomes 16 bits to each column, in units of its
group's largest magnitude, which is finer than bfloat16 is for that one, and an instruction that
multiplies four bytes by four and adds them up takes two steps to four weights. Bytes made to floats
took four times as many. A launch of its own makes a row so, after its norm: each of a product's
programs doing it took longer than the product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.activation import KINDS, activate
from ruvon.kernels.codes import codes_of
from ruvon.kernels.norm import Norm, normalize
from ruvon.kernels.ops import GATED, Activation, Packed
from ruvon.kernels.pdl import release, wait

GEMV_CODES_COLUMNS = 16384  # of a row that fits the registers


@triton.jit
def load_words(words_ptr, outputs, used, at, stride):
    """int32 [outputs, units, words]: four codes of eight bits each, or eight of four."""
    pointers = words_ptr + outputs.to(tl.int64)[:, None, None] * stride + at[None, :, :]
    mask = used[:, None, None] & (at < stride)[None, :, :]
    return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def load_table(table_ptr, groups, num_groups, outputs, stride, WANTED: tl.constexpr):
    """float32 [outputs, groups] of scales or offsets, which may be wanted."""
    values = tl.zeros([outputs.shape[0], groups.shape[0]], tl.float32)
    if WANTED:
        at = table_ptr + groups[:, None] * stride + outputs[None, :]
        values = tl.load(at, mask=(groups < num_groups)[:, None], other=0.0).T.to(tl.float32)
    return values


@triton.jit
def _quantize_kernel(
    x_ptr, residual_ptr, gain_ptr, shift_ptr, total_ptr, digits_ptr, tables_ptr,
    K, x_stride, num_digits, num_units, eps,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A row as whole numbers of 16 bits, two signed digits to the base 256, below the largest
    magnitude of ``WIDTH`` columns, which is 2^6 times as fine as a bfloat16 of that size."""
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    gain = tl.zeros([BLOCK_K], tl.float32)
    shift = gain
    if NORM > 0:
        gain = tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM == 2:
        shift = tl.load(shift_ptr + columns, mask=inside, other=0.0).to(tl.float32)
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
    most = tl.maximum(tl.max(tl.abs(wide), axis=1), 1e-30)
    whole = tl.floor(wide * (32512.0 / most)[:, None] + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    units = tl.arange(0, UNITS)
    at = units[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    digit_at = digits_ptr + row * 2 * num_digits + at
    tl.store(digit_at, high.to(tl.int8), mask=at < num_digits)
    tl.store(digit_at + num_digits, (whole - high * 256).to(tl.int8), mask=at < num_digits)
    table_at = tables_ptr + row * 2 * num_units + units
    tl.store(table_at, most / 32512.0, mask=units < num_units)
    tl.store(table_at + num_units, tl.sum(wide, axis=1), mask=units < num_units)


@triton.jit
def load_row(digits_ptr, tables_ptr, at, units, num_words, num_units):
    """(words of high digits, of low digits, [units] step, sum): four columns a word."""
    inside, there = at < num_words, units < num_units
    return (
        tl.load(digits_ptr + at, mask=inside, other=0),
        tl.load(digits_ptr + num_words + at, mask=inside, other=0),
        tl.load(tables_ptr + units, mask=there, other=0.0),
        tl.load(tables_ptr + num_units + units, mask=there, other=0.0),
    )


@triton.jit
def dot_bytes(a, b, NATIVE: tl.constexpr):
    """The sum of the products of two words' four signed bytes, exactly."""
    if NATIVE:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        total = (a >> 24) * (b >> 24)
        for byte in tl.static_range(3):
            total += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
    return total


@triton.jit
def dot_words(words, x, scale, offset, HAS_OFFSETS: tl.constexpr, NATIVE: tl.constexpr):
    """[outputs]: whole numbers by group first, so that a scale is applied once to each."""
    high, low, step, sum_of_x = x
    high = high[None, :, :].broadcast_to(words.shape)
    low = low[None, :, :].broadcast_to(words.shape)
    products = dot_bytes(words, high, NATIVE) * 256 + dot_bytes(words, low, NATIVE)
    sums = tl.sum(products, axis=2).to(tl.float32) * (scale * step[None, :])
    if HAS_OFFSETS:
        sums += offset * sum_of_x[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def _gemv_codes_kernel(
    digits_ptr,  # int32 words of `_quantize_kernel`'s, [ROWS, 2, num_words]
    tables_ptr,  # float32 [ROWS, 2, num_units]
    words_ptr,
    scales_ptr,
    offsets_ptr,
    bias_ptr,
    out_ptr,
    N,
    num_words,
    num_units,
    words_stride,
    table_stride,
    num_groups,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
    WORDS: tl.constexpr,  # of a unit: a group, or of four bits two
    BITS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    NATIVE: tl.constexpr,  # whether there is an instruction that multiplies bytes
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    used, ups = outputs < N, N + outputs
    units, inner = tl.arange(0, UNITS), tl.arange(0, WORDS)
    HALVES: tl.constexpr = 8 // BITS
    at = units[:, None] * WORDS + inner[None, :]
    row_at = units[:, None] * WORDS * HALVES + inner[None, :]
    words = load_words(words_ptr, outputs, used, at, words_stride)
    up_words = words
    if GATED:
        up_words = load_words(words_ptr, ups, used, at, words_stride)
    bias = tl.zeros([BLOCK_N], tl.float32)
    up_bias = bias
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=used, other=0.0).to(tl.float32)
        if GATED:
            up_bias = tl.load(bias_ptr + ups, mask=used, other=0.0).to(tl.float32)
    groups = units * HALVES
    scale = load_table(scales_ptr, groups, num_groups, outputs, table_stride, True)
    offset = load_table(offsets_ptr, groups, num_groups, outputs, table_stride, HAS_OFFSETS)
    up_scale, up_offset, high_scale, high_offset = scale, offset, scale, offset
    high_up_scale, high_up_offset = scale, offset
    if GATED:
        up_scale = load_table(scales_ptr, groups, num_groups, ups, table_stride, True)
        up_offset = load_table(offsets_ptr, groups, num_groups, ups, table_stride, HAS_OFFSETS)
    if BITS == 4:
        high_scale = load_table(scales_ptr, groups + 1, num_groups, outputs, table_stride, True)
        high_offset = load_table(
            offsets_ptr, groups + 1, num_groups, outputs, table_stride, HAS_OFFSETS
        )
        if GATED:
            high_up_scale = load_table(scales_ptr, groups + 1, num_groups, ups, table_stride, True)
            high_up_offset = load_table(
                offsets_ptr, groups + 1, num_groups, ups, table_stride, HAS_OFFSETS
            )
    wait(PDL)
    for row in tl.static_range(ROWS):
        digits_at, tables_at = digits_ptr + row * 2 * num_words, tables_ptr + row * 2 * num_units
        x = load_row(digits_at, tables_at, row_at, groups, num_words, num_units)
        low = words if BITS == 8 else words & 0x0F0F0F0F
        y = dot_words(low, x, scale, offset, HAS_OFFSETS, NATIVE)
        up = y
        if GATED:
            low = up_words if BITS == 8 else up_words & 0x0F0F0F0F
            up = dot_words(low, x, up_scale, up_offset, HAS_OFFSETS, NATIVE)
        if BITS == 4:
            x = load_row(digits_at, tables_at, row_at + WORDS, groups + 1, num_words, num_units)
            high = (words >> 4) & 0x0F0F0F0F
            y += dot_words(high, x, high_scale, high_offset, HAS_OFFSETS, NATIVE)
            if GATED:
                high = (up_words >> 4) & 0x0F0F0F0F
                up += dot_words(high, x, high_up_scale, high_up_offset, HAS_OFFSETS, NATIVE)
        y = activate(y + bias, ACTIVATION)
        if GATED:
            y *= up + up_bias
        tl.store(out_ptr + row * N + outputs, y.to(out_ptr.dtype.element_ty), mask=used)


class GemvTile(NamedTuple):
    outputs: int
    columns: int
    warps: int


def gemv_codes_tile(n: int, width: int, gated: bool) -> GemvTile:
    """For so many outputs of ``width`` bytes each: up to 256 bytes a thread, which make up for what
    it does to its part of the row, but two programs or more for each of 132 multiprocessors."""
    columns = triton.next_power_of_2(width)
    warps = 4 if columns <= 4096 else 8
    most = warps * 32 * 256 // columns // (2 if gated else 1)
    fair = 1 << max(0, (n // 264).bit_length() - 1)
    return GemvTile(max(1, min(most, fair, 16)), columns, warps)


def gemv_codes(
    x_TK: Tensor,
    residual_TK: Tensor | None,
    norm: Norm | None,
    weight: Packed,
    bias_N: Tensor | None,
    activation: Activation,
    out_dtype: torch.dtype,
    pdl: bool,
    tile: GemvTile | None = None,
) -> tuple[Tensor, Tensor]:
    """`gemv` of a weight that is kept as codes."""
    rows, k = x_TK.shape
    gated = activation in GATED
    n = weight.shape[0] // (2 if gated else 1)
    codes, scales, offsets = codes_of(weight)
    bits = 8 if weight.kind == "int8" else 4
    width = codes_of(weight).group(k) if bits == 8 else 32
    words = codes.view(torch.int32)
    tile = tile or gemv_codes_tile(n, codes.stride(0), gated)
    total_TK, digits, tables = _quantize(
        x_TK, residual_TK, norm, width, codes.stride(0) * 8 // bits, pdl
    )
    out_TN = torch.empty(rows, n, dtype=out_dtype, device=x_TK.device)
    _gemv_codes_kernel[(triton.cdiv(n, tile.outputs),)](
        digits.view(torch.int32),
        tables,
        words,
        scales,
        offsets,
        bias_N,
        out_TN,
        n,
        digits.shape[2] // 4,
        tables.shape[2],
        words.stride(0),
        scales.stride(0),
        len(scales),
        ROWS=rows,
        BLOCK_N=tile.outputs,
        UNITS=tile.columns // width,
        WORDS=width // 4,
        BITS=bits,
        HAS_OFFSETS=offsets is not None,
        NATIVE=x_TK.is_cuda,
        HAS_BIAS=bias_N is not None,
        ACTIVATION=KINDS[activation],
        GATED=gated,
        PDL=pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
    return out_TN, total_TK


def _quantize(
    x_TK: Tensor, residual_TK: Tensor | None, norm: Norm | None, width: int, columns: int, pdl: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + residual, digits of its norm int8 [T, 2, columns], float32 [T, 2, columns / width])."""
    rows, k = x_TK.shape
    digits = torch.empty(rows, 2, columns, dtype=torch.int8, device=x_TK.device)
    tables = torch.empty(rows, 2, columns // width, dtype=torch.float32, device=x_TK.device)
    total_TK = x_TK if residual_TK is None else torch.empty_like(x_TK)
    _quantize_kernel[(rows,)](
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
        BLOCK_K=triton.next_power_of_2(columns),
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )
    return total_TK, digits, tables
