"""Products of one or two rows and a weight kept as codes (see `ruvon.kernels.codes`).

As `ruvon.kernels.gemv`, but by whole numbers: a row becomes 16 bits to each column, in units of its
group's largest magnitude, which is finer than bfloat16 is for that one, and an instruction that
multiplies four bytes by four and adds them up takes two steps to four weights. Bytes made to floats
took four times as many.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.activation import KINDS, activate
from ruvon.kernels.codes import codes_of
from ruvon.kernels.norm import Norm
from ruvon.kernels.ops import GATED, Activation, Packed
from ruvon.kernels.pdl import release, wait


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
def load_row(x_ptr, residual_ptr, columns, inside, HAS_RESIDUAL: tl.constexpr):
    x = tl.load(x_ptr + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x = x + tl.load(residual_ptr + columns, mask=inside, other=0.0)
    return x


@triton.jit
def statistics(x_ptr, residual_ptr, total_ptr, K, eps, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
               HAS_RESIDUAL: tl.constexpr):  # fmt: skip
    """(what a norm takes away, what it multiplies by); the first program stores the sum."""
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    x = load_row(x_ptr, residual_ptr, columns, inside, HAS_RESIDUAL)
    if HAS_RESIDUAL:
        stored = tl.where(tl.program_id(0) == 0, K, 0)
        tl.store(total_ptr + columns, x, mask=columns < stored)
    mean, by = 0.0, 1.0
    if NORM > 0:  # both sums at once, as in `_gemv_kernel`
        wide = x.to(tl.float32)
        square = tl.sum(wide * wide, axis=0) / K
        if NORM == 2:
            mean = tl.sum(wide, axis=0) / K
            square = tl.maximum(square - mean * mean, 0.0)
        by = tl.rsqrt(square + eps)
    return mean, by


@triton.jit
def load_normed(
    x_ptr, residual_ptr, gain_ptr, shift_ptr, columns, K, mean, by,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """float32, as `_gemv_kernel` has it before it multiplies."""
    inside = columns < K
    x = load_row(x_ptr, residual_ptr, columns, inside, HAS_RESIDUAL)
    wide = x.to(tl.float32)
    if NORM > 0:
        wide = (wide - mean) * by * tl.load(gain_ptr + columns, mask=inside, other=0.0)
        if NORM == 2:
            wide += tl.load(shift_ptr + columns, mask=inside, other=0.0)
        wide = wide.to(x.dtype).to(tl.float32)
    return wide


@triton.jit
def put(x, BYTE: tl.constexpr):
    """Whole numbers of 16 bits as two signed digits to the base 256, each at a byte of a word."""
    whole = tl.floor(x + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    low = whole - high * 256
    return (high & 255) << (8 * BYTE), (low & 255) << (8 * BYTE)


@triton.jit
def quantize(
    x_ptr, residual_ptr, gain_ptr, shift_ptr, columns, K, mean, by,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Four columns a word, as 16 bits below the largest magnitude of their unit, which is 2^6 times
    as fine as a bfloat16 of that size: (words of high digits, of low digits, [units] step, sum)."""
    a = load_normed(
        x_ptr, residual_ptr, gain_ptr, shift_ptr, columns, K, mean, by, NORM, HAS_RESIDUAL
    )
    b = load_normed(
        x_ptr, residual_ptr, gain_ptr, shift_ptr, columns + 1, K, mean, by, NORM, HAS_RESIDUAL
    )
    c = load_normed(
        x_ptr, residual_ptr, gain_ptr, shift_ptr, columns + 2, K, mean, by, NORM, HAS_RESIDUAL
    )
    d = load_normed(
        x_ptr, residual_ptr, gain_ptr, shift_ptr, columns + 3, K, mean, by, NORM, HAS_RESIDUAL
    )
    most = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d)))
    most = tl.maximum(tl.max(most, axis=1), 1e-30)
    inverse = (32512.0 / most)[:, None]
    high_a, low_a = put(a * inverse, 0)
    high_b, low_b = put(b * inverse, 1)
    high_c, low_c = put(c * inverse, 2)
    high_d, low_d = put(d * inverse, 3)
    high, low = high_a | high_b | high_c | high_d, low_a | low_b | low_c | low_d
    return high, low, most / 32512.0, tl.sum(a + b + c + d, axis=1)


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
    x_ptr,
    residual_ptr,
    total_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    words_ptr,
    scales_ptr,
    offsets_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    x_stride,
    words_stride,
    table_stride,
    num_groups,
    eps,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNITS: tl.constexpr,
    WORDS: tl.constexpr,  # of a unit: a group, or of four bits two
    BITS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    NATIVE: tl.constexpr,  # whether there is an instruction that multiplies bytes
    NORM: tl.constexpr,  # 0 none, 1 RMS, 2 layer
    HAS_RESIDUAL: tl.constexpr,
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
    columns = (units[:, None] * WORDS * HALVES + inner[None, :]) * 4
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
        x_at, residual_at = x_ptr + row * x_stride, residual_ptr
        if HAS_RESIDUAL:
            residual_at = residual_ptr + row * K
        mean, by = statistics(
            x_at, residual_at, total_ptr + row * K, K, eps, BLOCK_K, NORM, HAS_RESIDUAL
        )
        x = quantize(
            x_at, residual_at, norm_weight_ptr, norm_bias_ptr, columns, K, mean, by,
            NORM, HAS_RESIDUAL,
        )  # fmt: skip
        low = words if BITS == 8 else words & 0x0F0F0F0F
        y = dot_words(low, x, scale, offset, HAS_OFFSETS, NATIVE)
        up = y
        if GATED:
            low = up_words if BITS == 8 else up_words & 0x0F0F0F0F
            up = dot_words(low, x, up_scale, up_offset, HAS_OFFSETS, NATIVE)
        if BITS == 4:
            x = quantize(
                x_at, residual_at, norm_weight_ptr, norm_bias_ptr, columns + 4 * WORDS, K, mean, by,
                NORM, HAS_RESIDUAL,
            )  # fmt: skip
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


def gemv_codes_tile(n: int, width: int, bits: int, gated: bool) -> GemvTile:
    """For so many outputs of ``width`` bytes each: up to 256 codes a thread, which make up for what
    it does to its part of the row, but two programs or more for each of 132 multiprocessors."""
    columns = triton.next_power_of_2(width)
    warps = 4 if columns <= 4096 else 8
    most = warps * 32 * 32 * bits // columns // (2 if gated else 1)
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
    tile = tile or gemv_codes_tile(n, codes.stride(0), bits, gated)
    out_TN = torch.empty(rows, n, dtype=out_dtype, device=x_TK.device)
    total_TK = x_TK if residual_TK is None else torch.empty_like(x_TK)
    _gemv_codes_kernel[(triton.cdiv(n, tile.outputs),)](
        x_TK,
        residual_TK,
        total_TK,
        norm.weight_C if norm else None,
        norm.bias_C if norm else None,
        words,
        scales,
        offsets,
        bias_N,
        out_TN,
        n,
        k,
        x_TK.stride(0),
        words.stride(0),
        scales.stride(0),
        len(scales),
        norm.eps if norm else 0.0,
        ROWS=rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=triton.next_power_of_2(k),
        UNITS=tile.columns // width,
        WORDS=width // 4,
        BITS=bits,
        HAS_OFFSETS=offsets is not None,
        NATIVE=x_TK.is_cuda,
        NORM=0 if norm is None else 1 if norm.bias_C is None else 2,
        HAS_RESIDUAL=residual_TK is not None,
        HAS_BIAS=bias_N is not None,
        ACTIVATION=KINDS[activation],
        GATED=gated,
        PDL=pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
    return out_TN, total_TK
