"""The innermost loop of every matrix product: up to 8 rows of activations by 16 rows of weight.

Written as LLVM code by a Python function, because what makes it fast is unrolling over rows, and
Python's own loop is the clearest way to say that. Sixteen weight rows lie across the lanes of a
vector, so each lane sums one output in the order of k, whatever the batch, the number of threads
or the machine: this is where ruvon's determinism on the CPU comes from.

Quantized weights meet activations quantized to int8 in groups of 32 (`BLOCK`): one instruction
multiplies 64 bytes pairwise and adds them by fours into 16 exact integers; scales are applied
once a group. Weights in pairs of bfloat16 meet activations rounded to bfloat16: one instruction
adds both products of each pair to 16 float32 sums. See `layout` for how all of them lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ruvon.kernels.cpu.kinds import (
    BLOCK,
    BRAIN_BLOCK,
    GROUP,
    KINDS,
    NEGATED,
    NEGATED_HALF,
    ROWS,
    SCALE,
    TOTAL,
    TileKind,
)
from ruvon.kernels.cpu.simd import (
    BF16,
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    call,
    define,
    emit_prefetch,
    f32x16,
    fused,
    greater,
    load_as,
    splat,
    store_as,
    tree,
    vector,
    widen,
)

F32V, I32V, PAIRS = vector(F32), vector(I32), vector(BF16, 2 * LANES)
ZEROS = ir.Constant(F32V, [0.0] * LANES)


def number(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def offset(b: ir.IRBuilder, address: ir.Value, value: int) -> ir.Value:
    return b.add(address, number(value)) if value else address


def broadcast(b: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    """One number from memory in all lanes: part of the instruction that uses it, on AVX-512."""
    return splat(b, load_as(b, address, kind, 4))


def quantize_lanes(b: ir.IRBuilder, x: ir.Value, by: ir.Value) -> ir.Value:
    """x * by rounded to the nearest integer (ties to even), plus a constant whose low byte is 0:
    adding 1.5 * 2 ** 23 leaves the integer in a float's low bits."""
    shift = ir.Constant(F32V, [12582912.0] * LANES)
    return b.bitcast(b.fadd(b.fmul(x, by), shift), I32V)


def sum_halves(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The sums of x's and of y's lanes, folded together."""
    low, high = [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
    both = b.add(*(b.shuffle_vector(x, y, ir.Constant(I32V, part)) for part in (low, high)))
    for width in (4, 2, 1):
        moved = [lane ^ width for lane in range(LANES)]
        both = b.add(both, b.shuffle_vector(both, both, ir.Constant(I32V, moved)))
    return tuple(b.extract_element(both, ir.Constant(I32, lane)) for lane in (0, 8))


@intrinsic
def quantize_group(typing, x, y, block):
    """Write 32 floats as one group of a packed row: codes, scale, and the sums of codes."""

    def emit(b, x, y, block):
        sizes = [call(b, "llvm.fabs.v16f32", F32V, [value]) for value in (x, y)]
        peak = tree(b, greater(b, *sizes), greater)
        some = b.fcmp_ordered(">", peak, ir.Constant(F32, 0.0))
        inverse = b.fdiv(ir.Constant(F32, 127.0), peak)
        by = splat(b, b.select(some, inverse, ir.Constant(F32, 0.0)))
        first, second = (quantize_lanes(b, value, by) for value in (x, y))
        codes = [b.trunc(code, vector(I8)) for code in (first, second)]
        for half, code in enumerate(codes):
            store_as(b, offset(b, block, 16 * half), code, 1)
        first_sum, second_sum = sum_halves(b, *(b.sext(code, I32V) for code in codes))
        total = b.add(first_sum, second_sum)
        by_128 = ir.Constant(I32, -128)
        store_as(b, offset(b, block, SCALE), b.fmul(peak, ir.Constant(F32, 1 / 127)), 4)
        store_as(b, offset(b, block, TOTAL), b.sitofp(total, F32), 4)
        store_as(b, offset(b, block, NEGATED), b.mul(total, by_128), 4)
        store_as(b, offset(b, block, NEGATED_HALF), b.mul(first_sum, by_128), 4)

    return define(types.void, (f32x16, f32x16, types.intp), emit)


def counted_loop(
    b: ir.IRBuilder,
    count: ir.Value,
    start: list[ir.Value],
    body: Callable[[list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """``count`` (at least 1) turns of ``body``, which maps the carried values to their next."""
    before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
    b.branch(loop)
    b.position_at_end(loop)
    turn = b.phi(I64)
    turn.add_incoming(number(0), before)
    carried = [b.phi(value.type) for value in start]
    for phi, value in zip(carried, start, strict=True):
        phi.add_incoming(value, before)
    following = body(carried)
    next_turn = b.add(turn, number(1))
    for phi, value in zip((turn, *carried), (next_turn, *following), strict=True):
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", next_turn, count), loop, after)
    b.position_at_end(after)
    return following


def dot_bytes(b: ir.IRBuilder, sums: ir.Value, u: ir.Value, s: ir.Value, vnni: bool) -> ir.Value:
    """Add to each int32 lane the four products of its unsigned and its signed bytes, exactly."""
    if vnni:
        return call(b, "llvm.x86.avx512.vpdpbusd.512", I32V, [sums, u, s])
    u, s = (b.bitcast(value, vector(I8, 4 * LANES)) for value in (u, s))
    u16, s16 = b.zext(u, vector(I16, 4 * LANES)), b.sext(s, vector(I16, 4 * LANES))
    for j in range(2):  # pairs first: what LLVM knows as one multiply-add of 16-bit pairs
        pairs = [
            b.sext(pick(b, half, range(2 * j + k, 4 * LANES, 4)), I32V)
            for k in range(2)
            for half in (u16, s16)
        ]
        pair = b.add(b.mul(pairs[0], pairs[1]), b.mul(pairs[2], pairs[3]))
        sums = b.add(sums, pair)
    return sums


def pick(b: ir.IRBuilder, x: ir.Value, lanes: range) -> ir.Value:
    return b.shuffle_vector(x, x, ir.Constant(vector(I32, len(lanes)), list(lanes)))


def load_codes(b: ir.IRBuilder, w: ir.Value, kind: TileKind) -> list[ir.Value]:
    """The eight vectors of unsigned codes of one group: lane = weight row, bytes = four k."""
    if kind.storage == "q8":
        return [load_as(b, offset(b, w, 64 * q), I32V, 64) for q in range(8)]
    low = ir.Constant(I32V, [0x0F0F0F0F] * LANES)
    four = ir.Constant(I32V, [4] * LANES)
    codes = []
    for q in range(4):
        pair = load_as(b, offset(b, w, 64 * q), I32V, 64)
        codes += [b.and_(pair, low), b.and_(b.lshr(pair, four), low)]
    return codes


def load_scales(b: ir.IRBuilder, s: ir.Value, kind: TileKind) -> list[ir.Value]:
    """The scales of one group (two if halves), then its offsets if there are any."""
    count = kind.group_scale_bytes // kind.scale_bytes
    element = vector(F32 if kind.wide else F16)
    return [
        widen(b, load_as(b, offset(b, s, i * kind.scale_bytes), element, 32)) for i in range(count)
    ]


def bias_of_zero(b: ir.IRBuilder, x: ir.Value, kind: TileKind, part: int) -> ir.Value:
    """-zero * (sum of activation codes): where the integer sum starts, so that codes are signed."""
    if not kind.zero:
        return ir.Constant(I32V, [0] * LANES)
    negated = negated_sum(b, x, kind, part)
    if kind.zero == 128:
        return negated
    return b.ashr(negated, ir.Constant(I32V, [4] * LANES))  # 8 = 128 / 16


def negated_sum(b: ir.IRBuilder, x: ir.Value, kind: TileKind, part: int) -> ir.Value:
    """-128 * sum of the activation codes in this part of the group."""
    if not kind.half:
        return broadcast(b, offset(b, x, NEGATED), I32)
    first = broadcast(b, offset(b, x, NEGATED_HALF), I32)
    return first if part == 0 else b.sub(broadcast(b, offset(b, x, NEGATED), I32), first)


def float_sum(b: ir.IRBuilder, x: ir.Value, kind: TileKind, part: int) -> ir.Value:
    if not kind.half:
        return broadcast(b, offset(b, x, TOTAL), F32)
    negated = b.sitofp(negated_sum(b, x, kind, part), F32V)
    return b.fmul(negated, ir.Constant(F32V, [-1 / 128] * LANES))


def group_product(
    b: ir.IRBuilder,
    x: ir.Value,
    codes: list[ir.Value],
    scales: list[ir.Value],
    kind: TileKind,
    part: int,
) -> ir.Value:
    """One row's share of one group (or half a group), before the activation's scale."""
    per_part = len(codes) // kind.scales_per_group
    sums = bias_of_zero(b, x, kind, part)
    for q in range(part * per_part, (part + 1) * per_part):
        sums = dot_bytes(b, sums, codes[q], broadcast(b, offset(b, x, 4 * q), I32), kind.vnni)
    product = b.fmul(b.sitofp(sums, F32V), scales[part])
    if kind.offsets:
        return fused(b, scales[kind.scales_per_group + part], float_sum(b, x, kind, part), product)
    return product


def quantized_step(
    b: ir.IRBuilder,
    w: ir.Value,
    s: ir.Value,
    x: ir.Value,
    outs: list[ir.Value],
    kind: TileKind,
) -> list[ir.Value]:
    """One group of k for all rows. Row r's block lies ``r * BLOCK`` bytes behind x."""
    codes, scales = load_codes(b, w, kind), load_scales(b, s, kind)
    following = []
    for row, out in enumerate(outs):
        block = offset(b, x, row * BLOCK)
        scale = broadcast(b, offset(b, block, SCALE), F32)
        for part in range(kind.scales_per_group):
            out = fused(b, group_product(b, block, codes, scales, kind, part), scale, out)
        following.append(out)
    return following


DENSE = {"f32": vector(F32), "f16": vector(F16), "bf16": vector(I16)}  # as they are in memory


@intrinsic(prefer_literal=True)
def load_dense(typing, kind, address):
    """Sixteen numbers of a dense tile."""
    element = DENSE[KINDS[kind.literal_value].storage]
    return define(
        f32x16, (kind, types.intp), lambda b, _, address: widen(b, load_as(b, address, element, 2))
    )


def dense_step(
    b: ir.IRBuilder,
    tiles: list[ir.Value],
    x_rows: list[ir.Value],
    sums: list[ir.Value],
    storage: str,
) -> list[ir.Value]:
    """One k: each row's number, at ``x_rows``, times each of the tiles' vectors.

    ``sums`` is row by row, a row's tiles side by side.
    """
    weights = [widen(b, load_as(b, tile, DENSE[storage], 32)) for tile in tiles]
    numbers = [broadcast(b, x, F32) for x in x_rows]
    pairs = [(weight, x) for x in numbers for weight in weights]
    return [fused(b, weight, x, total) for (weight, x), total in zip(pairs, sums, strict=True)]


PAIRS_LATENCY = 6  # cycles until the sums of `dot_pairs` can be added to


def dot_pairs(b: ir.IRBuilder, sums: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """Add to each float32 lane the two products of its bfloat16 pairs. Subnormals count as zero."""
    return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", F32V, [sums, w, b.bitcast(x, PAIRS)])


def pairs_step(b: ir.IRBuilder, w: ir.Value, x: ir.Value, outs: list[ir.Value]) -> list[ir.Value]:
    """One group of k for all rows. Row r's block lies ``r * BRAIN_BLOCK`` bytes behind x."""
    for q in range(GROUP // 2):
        weights = load_as(b, offset(b, w, 64 * q), PAIRS, 64)
        places = [offset(b, x, row * BRAIN_BLOCK + 4 * q) for row in range(len(outs))]
        numbers = [broadcast(b, place, I32) for place in places]
        outs = [dot_pairs(b, out, weights, x) for out, x in zip(outs, numbers, strict=True)]
    return outs


def emit_fetch(b: ir.IRBuilder, address: ir.Value, kind: TileKind, rows: int) -> None:
    """Ask for a step's worth of what will be multiplied after this tile. What the hardware fetches
    by itself ends at each 4 KB; this doubles what one row's product gets out of memory, into the
    second-level cache: the first has too few requests in flight.

    A few rows of pairs take no longer than one, as an instruction waits for the one before it. Then
    loads run far ahead, and the hardware fetches best: asking for every line would be in its way.
    """
    size = kind.step_bytes + (kind.group_scale_bytes if kind.quantized else 0)
    for line in range(0, size, 256 if kind.pairs and rows <= PAIRS_LATENCY else 64):
        emit_prefetch(b, offset(b, address, line))


def emit_product(
    b: ir.IRBuilder,
    kind: TileKind,
    rows: int,
    w: ir.Value,
    x: ir.Value,
    steps: ir.Value,
    fetch: ir.Value,
) -> list[ir.Value]:
    """The sums of ``rows`` rows of packed activations by one tile."""
    scale_bytes = kind.group_scale_bytes if kind.quantized else 0

    def body(carried: list[ir.Value]) -> list[ir.Value]:
        w, s, x, fetch, *outs = carried
        emit_fetch(b, fetch, kind, rows)
        if kind.quantized:
            outs = quantized_step(b, w, s, x, outs, kind)
        elif kind.pairs:
            outs = pairs_step(b, w, x, outs)
        else:
            x_rows = [offset(b, x, 4 * row) for row in range(rows)]
            outs = dense_step(b, [w], x_rows, outs, kind.storage)
        fetch = offset(b, fetch, kind.step_bytes + scale_bytes)
        return [
            offset(b, w, kind.step_bytes),
            offset(b, s, scale_bytes),
            offset(b, x, ROWS * kind.row_bytes),
            fetch,
            *outs,
        ]

    scales = b.add(w, b.mul(steps, number(kind.step_bytes)))
    _, _, _, _, *outs = counted_loop(b, steps, [w, scales, x, fetch, *[ZEROS] * rows], body)
    return outs


def for_each_count(b: ir.IRBuilder, rows: ir.Value, emit: Callable[[int], None]) -> None:
    """A copy of the code for each number of rows from 1 to `ROWS`, and a jump to the right one."""
    done = b.append_basic_block("done")
    switch = b.switch(rows, done)
    for count in range(1, ROWS + 1):
        case = b.append_basic_block(f"rows{count}")
        switch.add_case(number(count), case)
        b.position_at_end(case)
        emit(count)
        b.branch(done)
    b.position_at_end(done)


@intrinsic(prefer_literal=True)
def multiply_tile(typing, kind, w, x, steps, out, out_stride, rows, fetch):
    """``rows`` (1 to 8) rows of packed activations by one tile of weights.

    ``kind`` indexes `KINDS` and is a constant of the kernel. ``out_stride`` is in bytes. From
    ``fetch`` on, as many bytes as the tile has are brought into the cache meanwhile.
    """
    tile = KINDS[kind.literal_value]

    def emit(b, _, w, x, steps, out, out_stride, rows, fetch):
        def of(count):
            for row, value in enumerate(emit_product(b, tile, count, w, x, steps, fetch)):
                store_as(b, b.add(out, b.mul(out_stride, number(row))), value, 4)

        for_each_count(b, rows, of)

    return define(types.void, (kind, *(types.intp,) * 7), emit)


TILES = 4  # tiles that attention multiplies at once
MOST_SUMS = 16  # vectors of sums that fit the registers beside what they are made from


def emit_attend(
    b: ir.IRBuilder,
    storage: str,
    tiles: list[ir.Value],
    x_rows: list[ir.Value],
    steps: ir.Value,
    places: list[ir.Value],
    fresh: bool,
) -> None:
    """``places`` (rows by tiles) = or += products of rows of plain floats with tiles."""
    element_bytes = LANES * (4 if storage == "f32" else 2)

    def body(carried: list[ir.Value]) -> list[ir.Value]:
        at, *rest = carried
        here, sums = rest[: len(tiles)], rest[len(tiles) :]
        sums = dense_step(b, here, [b.add(row, at) for row in x_rows], sums, storage)
        return [offset(b, at, 4), *(offset(b, tile, element_bytes) for tile in here), *sums]

    start = [ZEROS if fresh else load_as(b, place, F32V, 4) for place in places]
    after = counted_loop(b, steps, [number(0), *tiles, *start], body)
    for place, value in zip(places, after[1 + len(tiles) :], strict=True):
        store_as(b, place, value, 4)


@intrinsic(prefer_literal=True)
def attend_tiles(typing, kind, fresh, x_stride, out_stride, addresses, x, steps, out, rows):
    """out[row, 16 * t : 16 * t + 16] = or += sum over k of x[row, k] * tile t[k], for attention.

    ``addresses`` points at those of `TILES` tiles. Here x is plain float32, a row every
    ``x_stride`` bytes. Strides, the kind and ``fresh`` (start from zero, not from out) are
    constants of the kernel.
    """
    storage = KINDS[kind.literal_value].storage
    x_bytes, out_bytes = x_stride.literal_value, out_stride.literal_value

    def emit(b, _k, _f, _x, _o, addresses, x, steps, out, rows):
        tiles = [load_as(b, offset(b, addresses, 8 * t), I64, 8) for t in range(TILES)]

        def of(count):
            x_rows = [offset(b, x, x_bytes * row) for row in range(count)]
            at_once = TILES if count * TILES <= MOST_SUMS else TILES // 2
            for first in range(0, TILES, at_once):
                some = range(first, first + at_once)
                places = [
                    offset(b, out, out_bytes * row + 64 * t) for row in range(count) for t in some
                ]
                chosen = [tiles[t] for t in some]
                emit_attend(b, storage, chosen, x_rows, steps, places, bool(fresh.literal_value))

        for_each_count(b, rows, of)

    return define(types.void, (kind, fresh, x_stride, out_stride, *(types.intp,) * 5), emit)
