"""Rows of a table that lies in tiles, as floats: an embedding."""

from __future__ import annotations

import functools

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ruvon.kernels.cpu.arguments import Embed
from ruvon.kernels.cpu.formats import FORMATS, GROUP, SUPER, TileFormat
from ruvon.kernels.cpu.isa import ISAS, Isa
from ruvon.kernels.cpu.jit.dots import Group
from ruvon.kernels.cpu.jit.simd import (
    F32V,
    I32V,
    arguments,
    constant,
    define,
    keep_first,
    load,
    load_as,
    number,
    offset,
    read_i32,
    splat16,
    store,
    store_as,
    widen,
)
from ruvon.kernels.cpu.jit.tiles import DENSE, Scales, load_scales

ANY: Isa = ISAS[-1]  # tables are read the same way everywhere


def coded_numbers(group: Group, scales: Scales, k: int) -> ir.Value:
    """The ``k``-th of each of the 16 rows in a group of a quantized tile."""
    b, kind = group.b, group.kind
    shifted = b.lshr(group.codes(k // 4), constant(8 * (k % 4)))
    codes = b.sub(b.and_(shifted, constant(255)), constant(kind.zero))
    part = k * kind.scales_per_group // GROUP
    numbers = b.fmul(b.sitofp(codes, F32V), scales()[part])
    return b.fadd(numbers, scales()[kind.scales_per_group + part]) if kind.offsets else numbers


def dense_numbers(b: ir.IRBuilder, kind: TileFormat, w: ir.Value, k: int) -> ir.Value:
    """The same of a dense tile."""
    if not kind.pairs:
        return widen(b, load_as(b, offset(b, w, kind.step_bytes * k), DENSE[kind.storage], 32))
    both = load_as(b, offset(b, w, 64 * (k // 2)), I32V, 64)
    bits = b.and_(both, constant(0xFFFF0000)) if k % 2 else b.shl(both, constant(16))
    return b.bitcast(bits, F32V)


@intrinsic(prefer_literal=True)
def read_group(typing, kind, tile, steps, group, lane, out):
    """Write 32 numbers of a row, the ``lane``-th of a tile, at ``out``; ``kind`` is a constant."""
    form = FORMATS[kind.literal_value]

    def emit(b, _kind, tile, steps, group, lane, out):
        w = b.add(tile, b.mul(group, number(form.step_bytes * GROUP // form.step)))
        tables = b.add(tile, b.mul(steps, number(form.step_bytes)))
        over = b.add(tables, b.mul(steps, number(form.group_scale_bytes)))
        over = b.add(over, b.mul(b.udiv(group, number(SUPER)), number(form.super_bytes)))
        tables = b.add(tables, b.mul(group, number(form.group_scale_bytes)))
        scales = functools.cache(lambda: load_scales(b, form, tables, over))
        codes = Group(b, ANY, form, w)
        for k in range(GROUP):
            if form.quantized:
                numbers = coded_numbers(codes, scales, k)
            else:
                numbers = dense_numbers(b, form, w, k)
            store_as(b, offset(b, out, 4 * k), b.extract_element(numbers, lane), 4)

    return define(types.void, (kind, *(types.intp,) * 5), emit)


def make_embed(kind, isa):
    """The kernel that reads rows out of a table in tiles of this kind."""

    def embed(address, params, start, stop, scratch):
        a = arguments(Embed, address)
        zeros = splat16(0.0)
        for row in range(start, stop):
            token, out = read_i32(a.ids + 4 * row) - a.first, a.out + row * a.stride
            known = 0 <= token < a.rows
            tile = a.table.tiles + token // 16 * a.table.tile_bytes
            for k in range(0, a.width, 32):
                if known:
                    read_group(kind, tile, a.table.steps, k // 32, token % 16, scratch)
                left = a.width - k if known else 0
                store(out + 4 * k, keep_first(load(scratch), left, zeros))
                store(out + 4 * k + 64, keep_first(load(scratch + 64), left - 16, zeros))

    return embed
