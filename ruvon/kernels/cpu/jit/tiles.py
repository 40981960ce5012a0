"""The innermost loop of every matrix product: a few rows of activations by 16 rows of weight.

Written as LLVM code by a Python function, because what makes it fast is unrolling over rows, and
Python's own loop is the clearest way to say that. Sixteen weight rows lie across the lanes of a
vector, so each lane sums one output in the order of k, whatever the batch, the number of threads
or the machine: this is where ruvon's determinism on the CPU comes from. Where registers are
narrower, LLVM makes two or four of each vector.

Quantized weights meet activations quantized to int8 in groups of 32: products of bytes are added
up in exact integers (see `dots`); scales are applied once a group. Weights in pairs of bfloat16
meet activations rounded to bfloat16: one instruction adds both products of each pair to 16 float32
sums. See `layout` for how all of them lie in memory.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ruvon.kernels.cpu.formats import GROUP, LANES, ROWS, SCALE, SUPER, Form, TileFormat
from ruvon.kernels.cpu.isa import Isa
from ruvon.kernels.cpu.jit.dots import Group, code_sum, group_sums
from ruvon.kernels.cpu.jit.llvm import (
    BF16,
    F16,
    F32,
    F32V,
    I16,
    I32,
    I64,
    Builder,
    number,
    vector,
)
from ruvon.kernels.cpu.jit.simd import operation

PAIRS = vector(BF16, 2 * LANES)
ZEROS = ir.Constant(F32V, [0.0] * LANES)


def quantized_step(group: Group, x_rows: list[ir.Value], outs: list[ir.Value]) -> list[ir.Value]:
    """One group of k for all rows. What the sums are multiplied by is loaded behind them, or it
    would have to wait on the stack."""
    b = group.b
    following = []
    for rows in group.isa.in_turn(range(len(outs))):
        blocks = [x_rows[row] for row in rows]
        sums = [outs[row] for row in rows]
        for part in range(group.kind.scales_per_group):
            products = group_products(group, blocks, part)
            by = [b.broadcast(b.offset(block, SCALE), F32) for block in blocks]
            sums = [b.fused(*args) for args in zip(products, by, sums, strict=True)]
        following += sums
    return following


def group_products(group: Group, blocks: list[ir.Value], part: int) -> list[ir.Value]:
    """Each row's share of one group (or half a group), before the activation's scale."""
    b, kind = group.b, group.kind
    sums = group_sums(group, blocks, part)
    products = [b.fmul(each, group.scales[part]) for each in sums]
    if not kind.offsets:
        return products
    shift = group.scales[kind.scales_per_group + part]
    return [
        b.fused(shift, code_sum(group, block, part), product)
        for block, product in zip(blocks, products, strict=True)
    ]


DENSE = {"f32": vector(F32), "f16": vector(F16), "bf16": vector(I16)}  # as they are in memory


def make_load(storage: str) -> Any:
    """The function that loads sixteen numbers of a dense tile as floats."""
    return operation(lambda b, at: b.widen(b.load_as(at, DENSE[storage], 2)), types.intp)


def dense_step(
    b: Builder,
    tiles: list[ir.Value],
    x_rows: list[ir.Value],
    sums: list[ir.Value],
    storage: str,
) -> list[ir.Value]:
    """One k: each row's number, at ``x_rows``, times each of the tiles' vectors.

    ``sums`` is row by row, a row's tiles side by side.
    """
    weights = [b.widen(b.load_as(tile, DENSE[storage], 32)) for tile in tiles]
    numbers = [b.broadcast(x, F32) for x in x_rows]
    pairs = [(weight, x) for x in numbers for weight in weights]
    return [b.fused(weight, x, total) for (weight, x), total in zip(pairs, sums, strict=True)]


PAIRS_LATENCY = 6  # cycles until the sums of `dot_pairs` can be added to


def dot_pairs(b: Builder, sums: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """Add to each float32 lane the two products of its bfloat16 pairs. Subnormals count as zero."""
    return b.invoke("llvm.x86.avx512bf16.dpbf16ps.512", F32V, [sums, w, b.bitcast(x, PAIRS)])


def pairs_step(
    b: Builder, w: ir.Value, x_rows: list[ir.Value], outs: list[ir.Value]
) -> list[ir.Value]:
    """One group of k for all rows."""
    for q in range(GROUP // 2):
        weights = b.load_as(b.offset(w, 64 * q), PAIRS, 64)
        numbers = [b.broadcast(b.offset(x, 4 * q), I32) for x in x_rows]
        outs = [dot_pairs(b, out, weights, x) for out, x in zip(outs, numbers, strict=True)]
    return outs


def emit_fetch(b: Builder, address: ir.Value, kind: TileFormat, rows: int) -> None:
    """Ask for a step's worth of what will be multiplied after this tile. What the hardware fetches
    by itself ends at each 4 KB; this doubles what one row's product gets out of memory, into the
    second-level cache: the first has too few requests in flight.

    A few rows of pairs take no longer than one, as an instruction waits for the one before it. Then
    loads run far ahead, and the hardware fetches best: asking for every line would be in its way.
    """
    size = kind.step_bytes + kind.group_scale_bytes
    for line in range(0, size, 256 if kind.pairs and rows <= PAIRS_LATENCY else 64):
        b.prefetch(b.offset(address, line))


def emit_product(
    b: Builder,
    isa: Isa,
    kind: TileFormat,
    places: list[ir.Value],
    w: ir.Value,
    x_rows: list[ir.Value],
    steps: ir.Value,
    fetch: ir.Value,
) -> None:
    """Write the sums of rows of activations by one tile, each row's to its place."""
    tables = b.add(w, b.mul(steps, number(kind.step_bytes)))
    over = b.add(tables, b.mul(steps, number(kind.group_scale_bytes)))
    x_step = 4 if kind.form == Form.ROWS else ROWS * kind.form.group_bytes
    ahead = kind.step_bytes + kind.group_scale_bytes

    def body(turn: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        w, s, x, fetch, *outs = carried
        rows = [b.add(row, x) for row in x_rows]
        emit_fetch(b, fetch, kind, len(rows))
        if kind.quantized:
            by = b.add(over, b.mul(b.udiv(turn, number(SUPER)), number(kind.super_bytes)))
            outs = quantized_step(Group(b, isa, kind, w, s, by), rows, outs)
        elif kind.pairs:
            outs = pairs_step(b, w, rows, outs)
        else:
            outs = dense_step(b, [w], rows, outs, kind.storage)
        moves = {w: kind.step_bytes, s: kind.group_scale_bytes, x: x_step, fetch: ahead}
        return [*(b.offset(at, by) for at, by in moves.items()), *outs]

    start = [w, tables, number(0), fetch, *[ZEROS] * len(places)]
    _, _, _, _, *outs = b.counted_loop(steps, start, body)
    for place, value in zip(places, outs, strict=True):
        b.store_as(place, value, 4)


def make_multiply_tile(isa: Isa, kind: TileFormat) -> Any:
    """The function that multiplies some rows of activations, 1 to as many as the instruction set
    takes at once, by one tile of weights.

    Strides are in bytes; packed rows have their own. From ``fetch`` on, as many bytes as the tile
    has are brought into the cache meanwhile.
    """

    def body(b, w, x, x_stride, steps, out, out_stride, rows, fetch):
        if kind.form != Form.ROWS:
            x_stride = number(kind.form.group_bytes)

        def of(count):
            x_rows, places = (
                [b.add(first, b.mul(stride, number(row))) for row in range(count)]
                for first, stride in ((x, x_stride), (out, out_stride))
            )
            emit_product(b, isa, kind, places, w, x_rows, steps, fetch)

        b.for_each_count(rows, isa.rows, of)

    def emit(b, *arguments):
        b.outlined("multiply_tile", [*arguments], body)

    return operation(emit, *(types.intp,) * 8, result=types.void)


TILES = 4  # tiles that attention multiplies at once


def emit_attend(
    b: Builder,
    storage: str,
    tiles: list[ir.Value],
    x_rows: list[ir.Value],
    steps: ir.Value,
    places: list[ir.Value],
    fresh: bool,
) -> None:
    """``places`` (rows by tiles) = or += products of rows of plain floats with tiles."""
    element_bytes = LANES * (4 if storage == "f32" else 2)

    def body(_turn: ir.Value, carried: list[ir.Value]) -> list[ir.Value]:
        at, *rest = carried
        here, sums = rest[: len(tiles)], rest[len(tiles) :]
        sums = dense_step(b, here, [b.add(row, at) for row in x_rows], sums, storage)
        return [b.offset(at, 4), *(b.offset(tile, element_bytes) for tile in here), *sums]

    start = [ZEROS if fresh else b.load_as(place, F32V, 4) for place in places]
    after = b.counted_loop(steps, [number(0), *tiles, *start], body)
    for place, value in zip(places, after[1 + len(tiles) :], strict=True):
        b.store_as(place, value, 4)


def tiles_at_once(isa: Isa, rows: int) -> int:
    """Of `TILES`, so that sums fit the registers beside what they are made from."""
    most = isa.registers * isa.width // 2 // (4 * LANES)
    return next(n for n in (4, 2, 1) if rows * n <= most or n == 1)


def make_attend_tiles(isa: Isa, storage: str, fresh: bool, x_stride: int, out_stride: int) -> Any:
    """The function that attention multiplies `TILES` tiles with, at ``addresses`` in memory:
    out[row, 16 * t : 16 * t + 16] = or += sum over k of x[row, k] * tile t[k].

    Here x is plain float32. Strides are in bytes; ``fresh`` starts from zero, not from out.
    """

    def body(b, addresses, x, steps, out, rows):
        tiles = [b.load_as(b.offset(addresses, 8 * t), I64, 8) for t in range(TILES)]

        def of(count):
            x_rows = [b.offset(x, x_stride * row) for row in range(count)]
            at_once = tiles_at_once(isa, count)
            for first in range(0, TILES, at_once):
                some = range(first, first + at_once)
                places = [
                    b.offset(out, out_stride * row + 64 * t) for row in range(count) for t in some
                ]
                emit_attend(b, storage, tiles[first : some.stop], x_rows, steps, places, fresh)

        b.for_each_count(rows, isa.rows, of)

    def emit(b, *arguments):
        b.outlined(f"attend_{storage}_{'new' if fresh else 'on'}", [*arguments], body)

    return operation(emit, *(types.intp,) * 5, result=types.void)
