"""MXFP4 weights for Triton: how they lie in memory, and the products that multiply them out.

There are no 4-bit tensor cores before Blackwell, so codes become bfloat16 in registers, which is
what a product of few rows spends its instructions on: 11 on bits and 4 multiplications for 8 codes.
For that `pack_mxfp4` puts four codes into 16 bits so that each comes out by a shift and a mask,
already a bfloat16 times 2 ** -126. Multiplying by its block's scale times 2 ** 126, a bfloat16,
too, gives the exact value. A group of 64 along K becomes 16 such words: word ``h`` holds columns
``h``, ``16 + h``, ``32 + h`` and ``48 + h``, its *planes*; so the rows of x stay as they are, and
all of a plane's codes have one scale.

`ROWS` rows lie group by group, so that what a program reads at a time is whole lines of memory, one
after another: read row by row, where each is 11.25 lines long, it took a twelfth longer.

Twice two powers of two are 2 ** 128: a scale above 2 does not fit a bfloat16 then, so an expert
with one has all of its scales divided by a power of two, and its products multiplied by it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ruvon.kernels.ops import Mxfp4

GROUP = tl.constexpr(64)  # columns of 16 words
ROWS = tl.constexpr(64)  # of an expert that lie together; the last of it are padding
LINES = tl.constexpr(16)  # of 64 words, which a group of such rows is
LARGE = tl.constexpr(2.0**126)  # scales are so much too large, unpacked codes so much too small
UNIT = tl.constexpr(2.0**64)  # split sums are so much too large, which float32 has room for
_ROWS = 1 << 16  # to pack at a time, so that what lies in between stays small


class Codes(NamedTuple):
    """Experts' codes and scales."""

    words: Tensor  # int16 [E * N / ROWS, groups * LINES, 64]: [ROWS, 16] for each group
    scales: Tensor  # int16 [E, groups, N / ROWS, 8, 8]: those of row 8 * j + i of `ROWS` at [i, j],
    # exponents as a bfloat16 has them, of columns up to 32 in the low half
    factors: Tensor  # float32 [E]: what products are to be multiplied by


def pack_mxfp4(weight: Mxfp4, order_N: Tensor, num_experts: int, device: torch.device) -> Codes:
    """``order_N`` says which of an expert's rows comes where."""
    rows, blocks = weight.scales_NK.shape
    n, groups = rows // num_experts, triton.cdiv(blocks, 2)
    padded = triton.cdiv(n, ROWS.value) * ROWS.value
    shape = num_experts, padded // ROWS.value, groups * LINES.value, 64
    words = torch.empty(shape, dtype=torch.int16, device=device)
    lines = num_experts, groups, padded // ROWS.value, 8, 8
    scales = torch.empty(lines, dtype=torch.int16, device=device)
    factors = torch.empty(num_experts, dtype=torch.float32, device=device)
    order_N = order_N.to(device)
    step = max(1, _ROWS // n)
    for first in range(0, num_experts, step):
        experts = slice(first, min(first + step, num_experts))
        span = slice(experts.start * n, experts.stop * n)
        codes = weight.codes_NKB[span].to(device).view(-1, n, blocks, 16)[:, order_N]
        codes = pad(codes, (0, 0, 0, 0, 0, padded - n))
        words[experts] = _to_words(codes.flatten(0, 1), groups).view(-1, *shape[1:])
        exponents = weight.scales_NK[span].to(device).view(-1, n, blocks)[:, order_N].int()
        exponents = pad(exponents, (0, 0, 0, padded - n))
        scales[experts], factors[experts] = _to_scales(exponents, groups)
    return Codes(words.flatten(0, 1), scales, factors)


def _to_words(codes_NKB: Tensor, groups: int) -> Tensor:
    """[N, blocks of 32, 16 bytes] → int16 [N / ROWS, groups of 64, ROWS, 16]; a missing block is
    zeros."""
    n, blocks, _ = codes_NKB.shape
    codes = torch.stack((codes_NKB & 15, codes_NKB >> 4), dim=-1).flatten(1)
    codes = pad(codes, (0, 64 * groups - 32 * blocks))
    a, b, c, d = codes.view(n, groups, 4, 16).int().unbind(2)
    words = (a & 8) << 12 | (a & 7) << 6 | (b & 8) << 9 | (b & 7) << 3
    words |= (c & 8) << 6 | c & 7 | (d & 12) << 11 | (d & 3) << 10
    return words.to(torch.int16).view(-1, ROWS.value, groups, 16).transpose(1, 2).contiguous()


def _to_scales(exponents: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """[experts, N, blocks] of 2 ** (exponent - 127) → int16 [experts, groups,
    N / ROWS, 8, 8], factors."""
    num, n, blocks = exponents.shape
    too_large = (exponents.amax((1, 2)) - 128).clamp_min(0)
    exponents = (exponents - too_large.view(-1, 1, 1) + 126).clamp_min(0)
    exponents = pad(exponents, (0, 2 * groups - blocks))
    low, high = exponents.view(num, n, groups, 2).unbind(-1)
    packed = (low | high << 8).to(torch.int16).view(num, -1, 8, 8, groups)
    return packed.permute(0, 4, 1, 3, 2), torch.ldexp(
        torch.ones_like(too_large, dtype=torch.float32), too_large
    )


@triton.jit
def _unpack_bf16(words):
    """int16 → four bfloat16 tensors of that shape, the planes, times 2 ** -126."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b;
        and.b32 $0, $4, 0x81C081C0;
        shl.b32 a, $4, 3;
        and.b32 $1, a, 0x81C081C0;
        shl.b32 a, $4, 6;
        and.b32 $2, a, 0x81C081C0;
        shl.b32 a, $4, 1;
        and.b32 a, a, 0x80008000;
        shr.u32 b, $4, 5;
        and.b32 b, b, 0x01000100;
        or.b32 a, a, b;
        shr.u32 b, $4, 4;
        and.b32 b, b, 0x00C000C0;
        or.b32 $3, a, b;
        }""",
        "=r,=r,=r,=r,r",
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _unpack_fp32(words):
    """The same in float32, and without assembly."""
    w = words.to(tl.int32)
    a = ((w & 0x8000) << 16) | ((w & 0x01C0) << 16)
    b = ((w & 0x1000) << 19) | ((w & 0x0038) << 19)
    c = ((w & 0x0200) << 22) | ((w & 0x0007) << 22)
    d = ((w & 0x4000) << 17) | ((w & 0x2000) << 11) | ((w & 0x0C00) << 12)
    return (
        a.to(tl.float32, bitcast=True),
        b.to(tl.float32, bitcast=True),
        c.to(tl.float32, bitcast=True),
        d.to(tl.float32, bitcast=True),
    )


@triton.jit
def _scales(pairs, DTYPE: tl.constexpr):
    """Pairs of exponents int16 [N, groups] → two powers of two for each word, [N, groups * 16]."""
    if tl.bfloat16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            cvt.u32.u16 t, $2;
            prmt.b32 t, t, 0, 0x1404;
            shr.u32 t, t, 1;
            mov.b32 {$0, $1}, t;
            }""",
            "=h,=h,h",
            [pairs],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
        low, high = low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True)
    else:
        wide = pairs.to(tl.int32)
        low = ((wide & 0xFF) << 23).to(tl.float32, bitcast=True)
        high = ((wide >> 8 & 0xFF) << 23).to(tl.float32, bitcast=True)
    return _spread(low), _spread(high)


@triton.jit
def _spread(scales):
    """[N, groups] → [N, groups * 16]."""
    N: tl.constexpr = scales.shape[0]
    GROUPS: tl.constexpr = scales.shape[1]
    return tl.reshape(tl.broadcast_to(scales[:, :, None], (N, GROUPS, 16)), (N, GROUPS * 16))


@triton.jit
def _columns(a, b, c, d):
    """Four planes [N, groups * 16] → [N, groups * 64], columns as they were: registers' names."""
    N: tl.constexpr = a.shape[0]
    GROUPS: tl.constexpr = a.shape[1] // 16
    planes = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (N, GROUPS, 16, 2, 2))
    return tl.reshape(tl.permute(planes, (0, 1, 4, 3, 2)), (N, GROUPS * 64))


@triton.jit
def _rows(lines):
    """[N / ROWS, groups * LINES, 64], as they lie in memory → [N, groups * 16]."""
    BLOCKS: tl.constexpr = lines.shape[0]
    GROUPS: tl.constexpr = lines.shape[1] // LINES
    words = tl.reshape(lines, (BLOCKS, GROUPS, ROWS, 16))
    return tl.reshape(tl.permute(words, (0, 2, 1, 3)), (BLOCKS * ROWS, GROUPS * 16))


@triton.jit
def _rows_of_pairs(pairs):
    """[groups, N], as they lie in memory → [N, groups]."""
    GROUPS: tl.constexpr = pairs.shape[0]
    N: tl.constexpr = pairs.shape[1]
    places = tl.reshape(pairs, (GROUPS, N // ROWS, 8, 8))
    return tl.reshape(tl.permute(places, (1, 3, 2, 0)), (N, GROUPS))


@triton.jit
def _wait_for(sums):
    """``sums``, when the matrix unit has made them. No instruction, but a use of them, for want of
    which the compiler lets a loop's turns overlap: then registers hold the weights of two, and each
    is moved to where the unit reads it. Other programs overlap, and there is room for more."""
    return tl.inline_asm_elementwise("", "=f,0", [sums], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def multiply_mxfp4(
    sums, words_desc, codes, expert, first_row, x_at, used, x_desc, first_place,
    N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SORTED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``sums [rows of the weight, rows of x]`` plus their products. ``words_desc`` reads
    ``codes.words``; x is read through its own where it is ``SORTED``, else where ``x_at`` says."""
    DTYPE: tl.constexpr = x_desc.dtype if SORTED else x_at.dtype.element_ty
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    first_block = expert * BLOCKS + first_row // ROWS
    groups, rows = tl.arange(0, BLOCK_K // GROUP), first_row + tl.arange(0, sums.shape[0])
    scales_at = codes.scales + expert.to(tl.int64) * GROUPS * BLOCKS * ROWS + rows[None, :]
    factor = tl.load(codes.factors + expert)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        w = _rows(words_desc.load([first_block, k // GROUP * LINES, 0]))
        group = k // GROUP + groups
        pairs_at = scales_at + group[:, None] * BLOCKS * ROWS
        pairs = tl.load(pairs_at, mask=(group < GROUPS)[:, None], other=0)
        low, high = _scales(_rows_of_pairs(pairs), DTYPE)
        if tl.bfloat16 == DTYPE:
            a, b, c, d = _unpack_bf16(w)
        else:
            a, b, c, d = _unpack_fp32(w)
        weight = _columns(a * low, b * low, c * high, d * high).to(DTYPE)
        if SORTED:
            x = x_desc.load([first_place, k]).T
        else:
            columns = k + tl.arange(0, BLOCK_K)
            mask = used[None, :] & (columns < K)[:, None]
            x = tl.load(x_at[None, :] + columns[:, None], mask=mask, other=0.0)
        sums = tl.dot(weight, x, sums, input_precision="ieee")
        if tl.bfloat16 == DTYPE and not OVERLAP:
            sums = _wait_for(sums)
    return sums * factor


@triton.jit
def _half_columns(a, b):
    """Two planes [groups, N, 16] → the 32 columns that they are."""
    GROUPS: tl.constexpr = a.shape[0]
    N: tl.constexpr = a.shape[1]
    return tl.reshape(tl.permute(tl.join(a, b), (0, 1, 3, 2)), (GROUPS, N, 32))


@triton.jit
def _scales_of_lines(lines):
    """int32 [groups, 8, N / 16], each two rows' pairs → two powers of two, [groups, N, 1]."""
    low = tl.join(lines << 23, lines << 7)
    high = tl.join(lines << 15, lines >> 1)
    return _scales_of_rows(low), _scales_of_rows(high)


@triton.jit
def _scales_of_rows(lines):
    """[groups, 8, N / 16, two rows] with exponents in their places → float32 [groups, N, 1]."""
    GROUPS: tl.constexpr = lines.shape[0]
    N: tl.constexpr = lines.shape[2] * 16
    exponents = tl.permute(lines, (0, 2, 3, 1)) & 0x7F800000
    return tl.reshape(exponents, (GROUPS, N, 1)).to(tl.float32, bitcast=True)


@triton.jit
def multiply_split_mxfp4(
    codes, expert, first_row, x_at, used, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    BLOCK_K: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Products ``[R, rows of x]``, as `multiply_mxfp4` has them. Each of a program's warps takes
    all of its rows, 16, 32 or 64, and every ``WARPS``-th group of columns, and all are added up at
    the end; so programs of few rows have as many warps, with less to do one after another. Scales
    are applied behind the products; in bfloat16 that needs an x below 2 ** 63."""
    DTYPE: tl.constexpr = x_at.dtype.element_ty
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    BLOCKS: tl.constexpr = (N + ROWS - 1) // ROWS
    block, inside = first_row // ROWS, first_row % ROWS
    words_at = codes.words + (expert * BLOCKS + block).to(tl.int64) * GROUPS * ROWS * 16
    words_at += inside * 16 + tl.arange(0, R * 16)[None, :]
    lines_at = codes.scales.to(tl.pointer_type(tl.int32), bitcast=True)
    lines_at += (expert.to(tl.int64) * GROUPS * BLOCKS + block) * ROWS // 2 + inside // 16
    lines_at += tl.arange(0, 8)[None, :, None] * 4 + tl.arange(0, R // 16)[None, None, :]
    columns = tl.arange(0, 32)[None, :, None]
    x_at, used = x_at[None, None, :], used[None, None, :]
    factor = tl.load(codes.factors + expert)
    sums = tl.zeros([WARPS, R, x_at.shape[2]], tl.float32)
    for first in tl.range(0, GROUPS, BLOCK_K // GROUP, num_stages=STAGES):
        for i in tl.static_range(BLOCK_K // GROUP // WARPS):
            groups = (first + i * WARPS + tl.arange(0, WARPS))[:, None]
            words = tl.load(words_at + groups * ROWS * 16, mask=groups < GROUPS, other=0)
            groups = groups[:, :, None]
            lines_of = lines_at + groups * (BLOCKS * ROWS // 2)
            low, high = _scales_of_lines(tl.load(lines_of, mask=groups < GROUPS, other=0))
            near_columns, far_columns = groups * GROUP + columns, groups * GROUP + 32 + columns
            near = tl.load(x_at + near_columns, mask=used & (near_columns < K), other=0.0)
            far = tl.load(x_at + far_columns, mask=used & (far_columns < K), other=0.0)
            words = tl.reshape(words, (WARPS, R, 16))
            if tl.bfloat16 == DTYPE:
                a, b, c, d = _unpack_bf16(words)
                near, far = near * UNIT, far * UNIT
            else:
                a, b, c, d = _unpack_fp32(words)
                a, b, c, d = a * LARGE, b * LARGE, c * LARGE, d * LARGE
                low, high = low * (UNIT / LARGE), high * (UNIT / LARGE)
            weight = _half_columns(a, b).to(DTYPE)
            sums += tl.dot(weight, near, input_precision="ieee") * low
            weight = _half_columns(c, d).to(DTYPE)
            sums += tl.dot(weight, far, input_precision="ieee") * high
    return tl.sum(sums, axis=0) * (factor / UNIT)
