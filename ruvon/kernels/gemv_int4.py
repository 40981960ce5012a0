"""One or two rows and a weight kept as codes of four bits: see `ruvon.kernels.gemv_codes`."""

from __future__ import annotations

import triton
import triton.language as tl

from ruvon.kernels.activation import activate
from ruvon.kernels.digits import add_dot
from ruvon.kernels.pdl import release, wait


@triton.jit
def load_words(words_ptr, outputs, used, at, stride):
    """int32 [outputs, units, words]: eight codes each, of a unit's first group and its second."""
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
def dot_words(words, x, scale, offset, HAS_OFFSETS: tl.constexpr, NATIVE: tl.constexpr):
    """[outputs]: whole numbers by group first, so that a scale is applied once to each."""
    high, low, step, sum_of_x = x
    high = high[None, :, :].broadcast_to(words.shape)
    low = low[None, :, :].broadcast_to(words.shape)
    zero = tl.zeros(words.shape, tl.int32)
    products = add_dot(zero, words, high, NATIVE) * 256 + add_dot(zero, words, low, NATIVE)
    sums = tl.sum(products, axis=2).to(tl.float32) * (scale * step[None, :])
    if HAS_OFFSETS:
        sums += offset * sum_of_x[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def gemv_int4_kernel(
    digits_ptr,  # int32, four columns' digits each, [ROWS, 2, num_words]
    tables_ptr,  # float32, groups' units, then sums, [ROWS, 2, num_units]
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
    WORDS: tl.constexpr,  # of a unit, which is two groups
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
    at = units[:, None] * WORDS + inner[None, :]
    row_at = units[:, None] * WORDS * 2 + inner[None, :]
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
    groups = units * 2
    scale = load_table(scales_ptr, groups, num_groups, outputs, table_stride, True)
    offset = load_table(offsets_ptr, groups, num_groups, outputs, table_stride, HAS_OFFSETS)
    high_scale = load_table(scales_ptr, groups + 1, num_groups, outputs, table_stride, True)
    high_offset = load_table(
        offsets_ptr, groups + 1, num_groups, outputs, table_stride, HAS_OFFSETS
    )
    up_scale, up_offset, high_up_scale, high_up_offset = scale, offset, high_scale, high_offset
    if GATED:
        up_scale = load_table(scales_ptr, groups, num_groups, ups, table_stride, True)
        up_offset = load_table(offsets_ptr, groups, num_groups, ups, table_stride, HAS_OFFSETS)
        high_up_scale = load_table(scales_ptr, groups + 1, num_groups, ups, table_stride, True)
        high_up_offset = load_table(
            offsets_ptr, groups + 1, num_groups, ups, table_stride, HAS_OFFSETS
        )
    wait(PDL)
    for row in tl.static_range(ROWS):
        digits_at, tables_at = digits_ptr + row * 2 * num_words, tables_ptr + row * 2 * num_units
        x = load_row(digits_at, tables_at, row_at, groups, num_words, num_units)
        y = dot_words(words & 0x0F0F0F0F, x, scale, offset, HAS_OFFSETS, NATIVE)
        up = y
        if GATED:
            up = dot_words(up_words & 0x0F0F0F0F, x, up_scale, up_offset, HAS_OFFSETS, NATIVE)
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
