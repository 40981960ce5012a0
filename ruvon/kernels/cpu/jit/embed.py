"""Rows of a table that lies in tiles, as floats: an embedding."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ruvon.kernels.cpu.arguments import Embed
from ruvon.kernels.cpu.formats import GROUP, SUPER, TileFormat
from ruvon.kernels.cpu.isa import ISAS, Isa
from ruvon.kernels.cpu.jit import simd as v
from ruvon.kernels.cpu.jit.dots import Group
from ruvon.kernels.cpu.jit.llvm import F32V, I32V, Builder, constant, number
from ruvon.kernels.cpu.jit.simd import operation
from ruvon.kernels.cpu.jit.tiles import DENSE

ANY: Isa = ISAS[-1]  # tables are read the same way everywhere


def coded_numbers(group: Group, k: int) -> ir.Value:
    """The ``k``-th of each of the 16 rows in a group of a quantized tile."""
    b, kind = group.b, group.kind
    shifted = b.lshr(group.codes(k // 4), constant(8 * (k % 4)))
    codes = b.sub(b.and_(shifted, constant(255)), constant(kind.zero))
    part = k * kind.scales_per_group // GROUP
    numbers = b.fmul(b.sitofp(codes, F32V), group.scales[part])
    return b.fadd(numbers, group.scales[kind.scales_per_group + part]) if kind.offsets else numbers


def dense_numbers(b: Builder, kind: TileFormat, w: ir.Value, k: int) -> ir.Value:
    """The same of a dense tile."""
    if not kind.pairs:
        return b.widen(b.load_as(b.offset(w, kind.step_bytes * k), DENSE[kind.storage], 32))
    both = b.load_as(b.offset(w, 64 * (k // 2)), I32V, 64)
    bits = b.and_(both, constant(0xFFFF0000)) if k % 2 else b.shl(both, constant(16))
    return b.bitcast(bits, F32V)


def make_read_group(kind: TileFormat) -> Any:
    """The function that writes 32 numbers of a row, the ``lane``-th of a tile, at ``out``."""

    def emit(b, tile, steps, group, lane, out):
        w = b.add(tile, b.mul(group, number(kind.step_bytes * GROUP // kind.step)))
        tables = b.add(tile, b.mul(steps, number(kind.step_bytes)))
        over = b.add(tables, b.mul(steps, number(kind.group_scale_bytes)))
        over = b.add(over, b.mul(b.udiv(group, number(SUPER)), number(kind.super_bytes)))
        tables = b.add(tables, b.mul(group, number(kind.group_scale_bytes)))
        whole = Group(b, ANY, kind, w, tables, over)
        for k in range(GROUP):
            numbers = coded_numbers(whole, k) if kind.quantized else dense_numbers(b, kind, w, k)
            b.store_as(b.offset(out, 4 * k), b.extract_element(numbers, lane), 4)

    return operation(emit, *(types.intp,) * 5, result=types.void)


def make_embed(kind: TileFormat, isa: Isa):
    """The kernel that reads rows out of a table in tiles of this kind."""
    read_group = make_read_group(kind)

    def embed(address, params, start, stop, scratch):
        a = v.arguments(Embed, address)
        for row in range(start, stop):
            token, out = v.read_i32(a.ids + 4 * row) - a.first, v.row_at(a.out, row)
            known = 0 <= token < a.rows
            tile = a.table.tiles + token // 16 * a.table.tile_bytes
            for k in range(0, a.width, 32):
                if known:
                    read_group(tile, a.table.steps, k // 32, token % 16, scratch)
                left = a.width - k if known else 0
                v.store(out + 4 * k, v.keep_first(v.load(scratch), left, 0.0))
                v.store(out + 4 * k + 64, v.keep_first(v.load(scratch + 64), left - 16, 0.0))

    return embed
