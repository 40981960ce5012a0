"""Products of one or two rows, with the residual addition and the norm in front of them.

Such a product is bound by reading its weight once. A program has a few weight rows and loads them
whole into registers *before* it waits for the kernel in front of it (see `ruvon.kernels.pdl`); and
it can apply the residual addition and the norm itself, so that a layer is five launches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.activation import KINDS, activate
from ruvon.kernels.codes import codes_of
from ruvon.kernels.ops import GATED, Activation, Packed
from ruvon.kernels.pdl import release, wait

GEMV_ROWS = 2
GEMV_COLUMNS = 8192  # a weight row longer than this does not fit the registers


@triton.jit
def _gemv_kernel(
    x_ptr,
    residual_ptr,
    total_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    x_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,  # 0 none, 1 RMS, 2 layer
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    used, inside = outputs < N, columns < K
    at = weight_ptr + outputs.to(tl.int64)[:, None] * K + columns[None, :]
    mask = used[:, None] & inside[None, :]
    weight = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    up = weight
    if GATED:
        offset = tl.cast(N, tl.int64) * K
        up = tl.load(at + offset, mask=mask, other=0.0, eviction_policy="evict_first")
    bias = tl.zeros([BLOCK_N], tl.float32)
    up_bias = bias
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=used, other=0.0).to(tl.float32)
        if GATED:
            up_bias = tl.load(bias_ptr + N + outputs, mask=used, other=0.0).to(tl.float32)
    gain = tl.zeros([BLOCK_K], tl.float32)
    shift = gain
    if NORM > 0:
        gain = tl.load(norm_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM == 2:
        shift = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            x = x + tl.load(residual_ptr + row * K + columns, mask=inside, other=0.0)
            if tl.program_id(0) == 0:
                tl.store(total_ptr + row * K + columns, x, mask=inside)
        wide = x.to(tl.float32)
        if NORM > 0:  # both sums at once: every round through the whole program counts here
            square = tl.sum(wide * wide, axis=0) / K
            if NORM == 2:
                mean = tl.sum(wide, axis=0) / K
                scale = tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)
                wide = (wide - mean) * scale * gain + shift
            else:
                wide = wide * tl.rsqrt(square + eps) * gain
            wide = wide.to(x.dtype).to(tl.float32)
        y = activate(tl.sum(weight.to(tl.float32) * wide[None, :], axis=1) + bias, ACTIVATION)
        if GATED:
            y *= tl.sum(up.to(tl.float32) * wide[None, :], axis=1) + up_bias
        tl.store(out_ptr + row * N + outputs, y.to(out_ptr.dtype.element_ty), mask=used)


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


class Norm(NamedTuple):
    """The normalisation in front of a product: RMS without a bias, layer norm with one."""

    weight_C: Tensor
    bias_C: Tensor | None
    eps: float


class GemvTile(NamedTuple):
    outputs: int
    columns: int
    warps: int


def gemv_tile(k: int, gated: bool, normed: bool) -> GemvTile:
    """As measured on an H100: few weights a thread, so that many programs fit; but more where a
    norm has to be repeated by each of them."""
    columns = triton.next_power_of_2(k)
    warps = 4 if columns <= 1024 else 8
    per_thread = 64 if normed else 32
    outputs = max(1, warps * 32 * per_thread // columns // (2 if gated else 1))
    return GemvTile(outputs, columns, warps)


def gemv(
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
    """(act(norm(x + residual) Wᵀ + b), x + residual) for at most `GEMV_ROWS` rows."""
    if weight.kind != "dense":
        return gemv_codes(x_TK, residual_TK, norm, weight, bias_N, activation, out_dtype, pdl, tile)
    rows, k = x_TK.shape
    gated = activation in GATED
    n = weight.shape[0] // (2 if gated else 1)
    tile = tile or gemv_tile(k, gated, norm is not None)
    out_TN = torch.empty(rows, n, dtype=out_dtype, device=x_TK.device)
    total_TK = x_TK if residual_TK is None else torch.empty_like(x_TK)
    _gemv_kernel[(triton.cdiv(n, tile.outputs),)](
        x_TK,
        residual_TK,
        total_TK,
        norm.weight_C if norm else None,
        norm.bias_C if norm else None,
        weight.tensors[0],
        bias_N,
        out_TN,
        n,
        k,
        x_TK.stride(0),
        norm.eps if norm else 0.0,
        ROWS=rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.columns,
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


def gemv_codes_tile(width: int, gated: bool) -> GemvTile:
    """For weight rows of so many bytes."""
    columns = triton.next_power_of_2(width)
    warps = 4 if columns <= 4096 else 8
    outputs = max(1, warps * 32 * 128 // columns // (2 if gated else 1))
    return GemvTile(min(outputs, 16), columns, warps)


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
    tile = tile or gemv_codes_tile(codes.stride(0), gated)
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
