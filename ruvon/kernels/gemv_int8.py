"""One or two rows and a weight kept as codes of eight bits: see `ruvon.kernels.gemv_codes`.

A thread takes four words at a time, which are in its registers, and adds up what it multiplies in
its own sum of a row: threads meet once, at the end. What other threads load for it (scales, the
rows) goes through shared memory two numbers at a time, for each such trip is waited for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ruvon.kernels.activation import activate
from ruvon.kernels.digits import add_dot
from ruvon.kernels.pdl import release, wait


@triton.jit
def halves(pairs):
    """int64 → int32, the first and the second in memory."""
    return pairs.to(tl.int32), (pairs >> 32).to(tl.int32)


@triton.jit
def quarter(words):
    """[..., 4] → four tensors."""
    SHAPE: tl.constexpr = words.shape[:-1]
    even, odd = tl.split(tl.reshape(words, SHAPE + [2, 2]))  # noqa: RUF005
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def dot_quarters(words, x, NATIVE: tl.constexpr):
    """float32 [R, parts] of four words [R, parts] and four pairs of digits [parts]."""
    high = tl.zeros(words[0].shape, tl.int32)
    for i in tl.static_range(4):
        digits = halves(x[i])[0][None, :].broadcast_to(high.shape)
        high = add_dot(high, words[i], digits, NATIVE)
    sums = high * 256
    for i in tl.static_range(4):
        digits = halves(x[i])[1][None, :].broadcast_to(high.shape)
        sums = add_dot(sums, words[i], digits, NATIVE)
    return sums.to(tl.float32)


@triton.jit
def load_tables(
    scales_ptr, offsets_ptr, groups, num_groups, rows, stride, HAS_OFFSETS: tl.constexpr
):
    """uint32 [rows, groups]: a float16 scale, and in the upper half the offset."""
    at = groups[:, None] * stride + rows[None, :]
    mask = (groups < num_groups)[:, None]
    pair = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.uint16, bitcast=True).to(tl.uint32)
    if HAS_OFFSETS:
        offset = tl.load(offsets_ptr + at, mask=mask, other=0.0).to(tl.uint16, bitcast=True)
        pair |= offset.to(tl.uint32) << 16
    return pair.T


@triton.jit
def to_float32(halfword):
    """Of the bits of a float16."""
    return halfword.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def spread_groups(table, PER: tl.constexpr):
    """[R, groups] → [R, groups * PER]."""
    R: tl.constexpr = table.shape[0]
    GROUPS: tl.constexpr = table.shape[1]
    return tl.reshape(tl.broadcast_to(table[:, :, None], (R, GROUPS, PER)), (R, GROUPS * PER))


@triton.jit
def gemv_int8_kernel(
    digits_ptr,  # int64, four columns' digits each, [ROWS, num_words]
    steps_ptr,  # int64, a group's unit and sum, [ROWS, num_units]
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
    UNITS: tl.constexpr,  # groups
    WORDS: tl.constexpr,  # of a group
    HAS_OFFSETS: tl.constexpr,
    NATIVE: tl.constexpr,  # whether there is an instruction that multiplies bytes
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,  # then gates come first, and after them what they gate
    PDL: tl.constexpr,
):
    release(PDL)
    R: tl.constexpr = BLOCK_N * (2 if GATED else 1)
    PER: tl.constexpr = WORDS // 4
    i = tl.arange(0, R)
    outputs = tl.program_id(0) * BLOCK_N + i % BLOCK_N
    used, rows = outputs < N, outputs + i // BLOCK_N * N
    groups = tl.arange(0, UNITS)
    at = tl.arange(0, UNITS * PER)[:, None] * 4 + tl.arange(0, 4)[None, :]
    words_at = words_ptr + rows.to(tl.int64)[:, None, None] * words_stride + at[None, :, :]
    mask = used[:, None, None] & (at < words_stride)[None, :, :]
    words = tl.load(words_at, mask=mask, other=0, eviction_policy="evict_first")
    bias = tl.zeros([R], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rows, mask=used, other=0.0).to(tl.float32)
    tables = load_tables(
        scales_ptr, offsets_ptr, groups, num_groups, rows, table_stride, HAS_OFFSETS
    )
    wait(PDL)
    quarters = quarter(words)
    for row in tl.static_range(ROWS):
        x = tl.load(digits_ptr + row * num_words + at, mask=at < num_words, other=0)
        steps = tl.load(steps_ptr + row * num_units + groups, mask=groups < num_units, other=0)
        step, total = halves(steps)
        sums = dot_quarters(quarters, quarter(x), NATIVE)
        scale = to_float32(tables & 0xFFFF) * step.to(tl.float32, bitcast=True)[None, :]
        sums *= spread_groups(scale, PER)
        if HAS_OFFSETS:
            share = total.to(tl.float32, bitcast=True) * (1.0 / PER)
            sums += spread_groups(to_float32(tables >> 16) * share[None, :], PER)
        y = tl.sum(sums, axis=1) + bias
        if GATED:
            gate, up = tl.split(tl.reshape(y, (2, BLOCK_N)).T)
            y = activate(gate, ACTIVATION) * up
            columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        else:
            y, columns = activate(y, ACTIVATION), outputs
        tl.store(out_ptr + row * N + columns, y.to(out_ptr.dtype.element_ty), mask=columns < N)
