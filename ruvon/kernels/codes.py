"""Quantized weights as kernels read them: one layout for codes of 8 bits, one for those of 4.

Every format of `Quantized` becomes one of the two when it is packed, so a kernel needs a loader for
each width and none for each format:

    int8   value = code * scale [+ offset]   code from -128 to 127, a byte each [N, K]
    int4   value = code * scale + offset     code from 0 to 15, two a byte [N, K / 2]: byte ``32 u +
           j`` of a row has column ``64 u + j`` in its low half, ``64 u + 32 + j`` in its high one

Codes of 5 and 6 bits are widened to 8. Scales and offsets are float16, transposed to [groups, N]
with rows padded, so that a tile's lie side by side. That rounds the K-quants' (six bits times a
float16) by less than 2^-11, a quarter of what rounding a product's weights to bfloat16 does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.ops import Packed, Quantized, Stacked
from ruvon.kernels.pdl import release, wait

UNIT = 64  # columns that two codes a byte are arranged in
PADDING = 128  # outputs; the most that a tile has


class Codes(NamedTuple):
    """What is in a `Packed` of kind ``int8`` or ``int4``."""

    codes: Tensor  # int8, or uint8 with two in each, [N, bytes of a row]
    scales_GN: Tensor  # float16, as offsets, N padded
    offsets_GN: Tensor | None

    def group(self, columns: int) -> int:
        """Columns that share a scale."""
        return -(-columns // UNIT) * UNIT // len(self.scales_GN)


def codes_of(weight: Packed) -> Codes:
    codes, scales, *offsets = weight.tensors
    return Codes(codes, scales, offsets[0] if offsets else None)


def pack_codes(weight: Quantized | Stacked, device: torch.device) -> Packed:
    """Lay it out on ``device``."""
    parts = weight.parts if isinstance(weight, Stacked) else (weight,)
    narrow = all(part.bits == 4 and part.group == 32 for part in parts)
    group = min(part.group for part in parts)
    codes = torch.cat([_codes(part, device, narrow) for part in parts])
    tables = [_tables(part, device, narrow, group) for part in parts]
    scales = torch.cat([scales for scales, _ in tables])
    shape = (len(codes), parts[0].codes_NK.shape[1])
    tensors = [_two_a_byte(codes) if narrow else codes, _across(scales, shape[1])]
    if any(offsets is not None for _, offsets in tables):
        columns = [torch.zeros_like(s) if o is None else o for s, o in tables]
        tensors.append(_across(torch.cat(columns), shape[1]))
    return Packed("int4" if narrow else "int8", shape, tuple(tensors))


def _codes(part: Quantized, device: torch.device, narrow: bool) -> Tensor:
    codes = part.codes_NK.to(device)
    return codes.view(torch.uint8) if narrow else codes - part.zero


def _tables(
    part: Quantized, device: torch.device, narrow: bool, group: int
) -> tuple[Tensor, Tensor | None]:
    """float32 scales and offsets [N, K / group]; a four-bit code's zero goes into its offset."""
    scales, offsets = (None if t is None else t.to(device) for t in part.tables())
    assert scales is not None
    if narrow:
        offsets = (0 if offsets is None else offsets) - scales * part.zero
    repeat = part.group // group
    tables = (scales, offsets) if offsets is not None else (scales,)
    scales, *rest = (table.repeat_interleave(repeat, 1) for table in tables)
    return scales, rest[0] if rest else None


def _two_a_byte(codes_NK: Tensor) -> Tensor:
    n, k = codes_NK.shape
    whole = codes_NK.new_zeros(n, -(-k // UNIT) * UNIT)
    whole[:, :k] = codes_NK
    low, high = whole.view(n, -1, 2, UNIT // 2).unbind(2)
    return (low | (high << 4)).flatten(1).contiguous()


def _across(table_NG: Tensor, columns: int) -> Tensor:
    """float16 [G, N], with room for a tile behind the last output and groups for whole units."""
    n, groups = table_NG.shape
    units = -(-columns // UNIT) * UNIT * groups // columns
    across = table_NG.new_zeros(units, n // PADDING * PADDING + 2 * PADDING, dtype=torch.float16)
    across[:groups, :n] = table_NG.T
    return across


@triton.jit
def spread(
    table_ptr, groups, num_groups, outputs, stride, GROUP: tl.constexpr, PACKED_MATH: tl.constexpr
):
    """What belongs to each weight of a tile: [outputs, groups * GROUP] of [groups, N], float32, or
    for packed mathematics bfloat16."""
    at = table_ptr + groups[:, None] * stride + outputs[None, :]
    narrow = tl.load(at, mask=(groups < num_groups)[:, None], other=0.0).to(tl.float32)
    if PACKED_MATH:
        narrow = narrow.to(tl.bfloat16)
    wide = narrow.T[:, :, None].broadcast_to(outputs.shape[0], groups.shape[0], GROUP)
    return wide.reshape(outputs.shape[0], groups.shape[0] * GROUP)


@triton.jit
def to_float(code):
    """float32 of a whole number from 0 to 255. The lowest bits of 2^23 count ones, so it is put
    there and 2^23 taken away: conversion proper takes a unit that is four times as slow."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def scale_int8(codes, scale, offset, HAS_OFFSETS: tl.constexpr, PACKED_MATH: tl.constexpr):
    """code * scale [+ offset], with ``PACKED_MATH`` two at a time.

    There, the byte ``s ccccccc`` of a code is put behind 0x43, the upper half of 128 in bfloat16;
    128 + c less 128 or, where s is set, 256 is the code.
    """
    if PACKED_MATH:
        values = tl.inline_asm_elementwise(
            """{
            .reg .b32 pair, low, sign, minus;
            mov.b32 minus, 0xbf80bf80;
            prmt.b32 pair, $1, 0x43434343, 0x4140;
            and.b32 low, pair, 0x437f437f;
            and.b32 sign, pair, 0x43804380;
            fma.rn.bf16x2 low, sign, minus, low;
            fma.rn.bf16x2 $0, low, $2, $3;
            }""",
            "=r,r,r,r",
            [codes, scale, offset],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        values = (to_float(codes.to(tl.int32) + 128) - 128.0) * scale
        if HAS_OFFSETS:
            values += offset
    return values


@triton.jit
def scale_int4(codes, scale, offset, high_scale, high_offset, PACKED_MATH: tl.constexpr):
    """code * scale + offset of the low and of the high halves of bytes, with ``PACKED_MATH`` two at
    a time: 0x4300 + code is 128 + code in bfloat16."""
    if PACKED_MATH:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 codes, pair, one, less;
            mov.b32 one, 0x3f803f80;
            mov.b32 less, 0xc300c300;
            prmt.b32 codes, $2, 0, 0x4140;
            lop3.b32 pair, codes, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 pair, pair, one, less;
            fma.rn.bf16x2 $0, pair, $3, $4;
            shr.u32 codes, codes, 4;
            lop3.b32 pair, codes, 0x000f000f, 0x43004300, 0xea;
            fma.rn.bf16x2 pair, pair, one, less;
            fma.rn.bf16x2 $1, pair, $5, $6;
            }""",
            "=&r,=&r,r,r,r,r,r",
            [codes, scale, offset, high_scale, high_offset],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    else:
        low = to_float((codes & 15).to(tl.int32)) * scale + offset
        high = to_float((codes >> 4).to(tl.int32)) * high_scale + high_offset
    return low, high


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])  # they may begin anywhere
def _take_rows_kernel(
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    rows_ptr,
    out_ptr,
    num_columns,
    codes_stride,
    table_stride,
    first,
    num_rows,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    CUT: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    wait(PDL)
    release(PDL)  # not before: see ruvon.kernels.pdl
    row = tl.load(rows_ptr + place).to(tl.int64) if HAS_ROWS else place
    if CUT:
        row -= first
        there = (row >= 0) & (row < num_rows)
        row = tl.where(there, row, 0)
    codes_ptr += row * codes_stride
    if BITS == 8:
        codes = tl.load(codes_ptr + columns, mask=inside, other=0)
    else:
        pairs = tl.load(codes_ptr + columns // 64 * 32 + columns % 32, mask=inside, other=0)
        codes = (pairs >> (columns % 64 // 32 * 4).to(tl.uint8)) & 15
    table_at = columns // GROUP * table_stride + row
    values = codes.to(tl.float32) * tl.load(scales_ptr + table_at, mask=inside).to(tl.float32)
    if HAS_OFFSETS:
        values += tl.load(offsets_ptr + table_at, mask=inside).to(tl.float32)
    if CUT:
        values = tl.where(there, values, 0.0)
    out_at = out_ptr + place * num_columns + columns
    tl.store(out_at, values.to(out_ptr.dtype.element_ty), mask=inside)


def take_rows(
    weight: Packed,
    rows_L: Tensor | None,
    dtype: torch.dtype,
    pdl: bool = False,
    first: int | None = None,
) -> Tensor:
    """The values ``[L, K]`` of some rows, or of all. With a ``first``, the number of the weight's
    first row, rows that it does not have are zeros."""
    n, k = weight.shape
    codes, scales, offsets = codes_of(weight)
    out_LK = torch.empty(n if rows_L is None else len(rows_L), k, dtype=dtype, device=codes.device)
    block = min(1024, triton.next_power_of_2(k))
    _take_rows_kernel[(len(out_LK), triton.cdiv(k, block))](
        codes,
        scales,
        offsets,
        rows_L,
        out_LK,
        k,
        codes.stride(0),
        scales.stride(0),
        first or 0,
        n,
        BITS=8 if weight.kind == "int8" else 4,
        GROUP=codes_of(weight).group(k),
        HAS_ROWS=rows_L is not None,
        CUT=first is not None,
        HAS_OFFSETS=offsets is not None,
        BLOCK=block,
        PDL=pdl,
        launch_pdl=pdl,
    )
    return out_LK
