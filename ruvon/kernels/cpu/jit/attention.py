"""Keys and values into the paged cache, and attention over it.

Attention works on one *query tile* at a time: up to 16 tokens of one sequence and the query heads
that share one key/value head. It walks the sequence's keys in spans of 128, counted from position
0, with a running maximum and sum (the "online" softmax). A span's scores are products of the tile
with blocks of keys, 16 keys across the lanes of a vector; keys that a row may not see count as
nothing at all, exactly. So a row's result depends on its own position and keys only: not on the
chunk it came in, its neighbours in the tile, or the batch.
"""

from __future__ import annotations

import numpy as np

from ruvon.kernels.cpu.isa import ISAS
from ruvon.kernels.cpu.jit.rows import write_packs
from ruvon.kernels.cpu.jit.simd import (
    exp16,
    fma,
    get,
    keep_between,
    keep_first,
    larger,
    load,
    max_lanes,
    prefetch,
    read_f32,
    read_f64,
    read_i32,
    scatter_lanes,
    splat16,
    store,
    store_lanes,
    sum_lanes,
    write_f32,
    write_i64,
)
from ruvon.kernels.cpu.jit.tiles import TILES, attend_tiles, load_dense
from ruvon.kernels.cpu.jit.translate import helper
from ruvon.kernels.cpu.kinds import F32_CACHE, KINDS, LANES
from ruvon.kernels.cpu.program import (
    MOST_DIMS,
    QUERY_TOKENS,
    SCRATCH_BYTES,
    TILE_ROWS,
    Field,
    Param,
)

SPAN = 128  # keys
SPAN_BYTES = 4 * SPAN + 64  # one cache line more, so that rows do not compete for cache sets
ROW_BYTES = 4 * MOST_DIMS + 64

# A thread's scratch space.
SCORES = 0  # float32 [TILE_ROWS, SPAN], then the softmax's numerators
QUERIES = SCORES + TILE_ROWS * SPAN_BYTES  # float32 [TILE_ROWS, MOST_DIMS]
SUMS = QUERIES + TILE_ROWS * ROW_BYTES  # float32 [TILE_ROWS, MOST_DIMS]: weighted values
PEAKS = SUMS + TILE_ROWS * ROW_BYTES  # float32 [TILE_ROWS]
MASSES = PEAKS + TILE_ROWS * 4  # float32 [TILE_ROWS, 16]: sums of numerators, by lanes
HEAD = MASSES + TILE_ROWS * 64  # float32 [MOST_DIMS]: one head of one token
ADDRESSES = HEAD + ROW_BYTES  # int64 [TILES]
WIDENED = ADDRESSES + 64  # float32 [TILES, MOST_DIMS, 16]: tiles of the cache
assert WIDENED + 64 * TILES * MOST_DIMS <= SCRATCH_BYTES - 64

CACHE_BYTES = tuple(kind.step_bytes // LANES for kind in KINDS)  # of one number
FEW_ROWS = 8  # that multiply a tile of the cache as it is
LOWEST = np.float32(-1e30)  # below every score; not infinite, so that differences stay numbers


@helper
def normalize_head(head, dim, weight, eps):
    """RMS norm of one head in place; lanes behind its end stay zero."""
    squares, zeros = splat16(0.0), splat16(0.0)
    for c in range(0, dim, 16):
        value = load(head + 4 * c)
        squares = fma(value, value, squares)
    by = splat16(np.float32(1.0 / np.sqrt(sum_lanes(squares) / np.float32(dim) + eps)))
    for c in range(0, dim, 16):
        value = load(head + 4 * c) * by * load(weight + 4 * c)
        store(head + 4 * c, keep_first(value, dim - c, zeros))


@helper
def rotate_head(head, pairs, cos, sin):
    """Rotate dims (i, i + pairs) in place."""
    high = head + 4 * pairs
    if pairs % 16 == 0:
        for c in range(0, 4 * pairs, 64):
            a, b, x, y = load(head + c), load(high + c), load(cos + c), load(sin + c)
            store(head + c, a * x - b * y)
            store(high + c, b * x + a * y)
        return
    for c in range(0, 4 * pairs, 4):
        a, b = read_f32(head + c), read_f32(high + c)
        x, y = read_f32(cos + c), read_f32(sin + c)
        write_f32(head + c, np.float32(a * x) - np.float32(b * y))
        write_f32(high + c, np.float32(b * x) + np.float32(a * y))


@helper
def prepare_head(instruction, source, token, norm, head):
    """Copy one head to ``head``, norm and rotate it there."""
    dim, zeros = get(instruction, Field.HEAD_DIM), splat16(0.0)
    for c in range(0, dim, 16):
        store(head + 4 * c, keep_first(load(source + 4 * c), dim - c, zeros))
    if norm != 0:
        normalize_head(head, dim, norm, read_f64(instruction + 8 * Field.EPS))
    pairs = get(instruction, Field.ROTATED)
    if pairs != 0:
        at = read_i32(get(instruction, Field.IDS) + 4 * token) * 4 * pairs
        rotate_head(head, pairs, get(instruction, Field.COS) + at, get(instruction, Field.SIN) + at)


def make_write_kv(cache, isa):
    """The kernel that splits q | k | v, norms and rotates q and k, and fills the cache.

    A unit is one token's query heads and key/value head of one group.
    """
    size = CACHE_BYTES[cache]
    bits, brain = 8 * size, int(KINDS[cache].storage == "bf16")

    def write_kv(instruction, params, start, stop, scratch):
        groups, dim = get(instruction, Field.KV_HEADS), get(instruction, Field.HEAD_DIM)
        heads, page = get(instruction, Field.HEADS), get(instruction, Field.PAGE)
        share, padded, head = heads // groups, round_lanes(dim), scratch + HEAD
        for unit in range(start, stop):
            token, group = unit // groups, unit % groups
            row = get(instruction, Field.X) + token * get(instruction, Field.X_STRIDE)
            out = get(instruction, Field.OUT) + token * get(instruction, Field.OUT_STRIDE)
            for h in range(group * share, (group + 1) * share):
                prepare_head(
                    instruction, row + 4 * h * dim, token, get(instruction, Field.Q_NORM), head
                )
                for c in range(0, dim, 16):
                    store(out + 4 * (h * padded + c), load(head + 4 * c))
            key = row + 4 * (heads + group) * dim
            prepare_head(instruction, key, token, get(instruction, Field.K_NORM), head)
            slot = read_i32(get(instruction, Field.SLOTS) + 4 * token)
            place = (slot // page * groups + group) * page * padded
            offset = slot % page
            keys = get(instruction, Field.KEYS) + size * (
                place + offset // 16 * 16 * padded + offset % 16
            )
            values = get(instruction, Field.VALUES) + size * (place + 16 * offset)
            value = key + 4 * groups * dim
            zeros = splat16(0.0)
            for c in range(0, dim, 16):
                scatter_lanes(bits, brain, keys + size * 16 * c, load(head + 4 * c))
                of_value = keep_first(load(value + 4 * c), dim - c, zeros)
                store_lanes(bits, brain, values + size * page * c, of_value)

    return write_kv


@helper
def round_lanes(count):
    return (count + 15) // 16 * 16


@helper
def tile_tokens(share):
    """Tokens of a query tile when ``share`` query heads share a key/value head."""
    return max(1, min(QUERY_TOKENS, TILE_ROWS // share))


@helper
def find_tile(instruction, params, tile):
    """(sequence, its first token in this tile): tiles are numbered sequence by sequence."""
    starts = get(instruction, Field.STARTS)
    tokens = QUERY_TOKENS
    for s in range(get(params, Param.SEQUENCES)):
        first, end = read_i32(starts + 4 * s), read_i32(starts + 4 * s + 4)
        tiles = (end - first + tokens - 1) // tokens
        if tile < tiles:
            return s, first + tile * tokens
        tile -= tiles
    return 0, 0


@helper
def gather_queries(instruction, scratch, group, first, count):
    """Copy the tile's query rows together and clear its running state."""
    share = get(instruction, Field.HEADS) // get(instruction, Field.KV_HEADS)
    dim = round_lanes(get(instruction, Field.HEAD_DIM))
    zeros = splat16(0.0)
    for t in range(count):
        token = get(instruction, Field.X) + (first + t) * get(instruction, Field.X_STRIDE)
        for h in range(share):
            row = t * share + h
            source = token + 4 * (group * share + h) * dim
            for c in range(0, 4 * dim, 64):
                store(scratch + QUERIES + row * ROW_BYTES + c, load(source + c))
                store(scratch + SUMS + row * ROW_BYTES + c, zeros)
            write_f32(scratch + PEAKS + 4 * row, LOWEST)
            store(scratch + MASSES + 64 * row, zeros)


@helper
def seen(x, c, seen_from, seen_to, other):
    """Lanes of x that stand for keys from ``seen_from`` to ``seen_to``, x starting at key c."""
    if seen_from <= c and c + 16 <= seen_to:
        return x
    return keep_between(x, seen_from - c, seen_to - c, other)


@helper
def soften(scratch, row, seen_from, seen_to, keys, dim, scale):
    """One row of one span: scores to numerators, in step with the running peak and mass.

    The row sees the span's keys ``seen_from`` to ``seen_to``; ``keys`` of them were computed.
    """
    scores, by, low = scratch + SCORES + row * SPAN_BYTES, splat16(scale), splat16(LOWEST)
    peaks = low
    for c in range(0, keys, 16):
        value = seen(load(scores + 4 * c) * by, c, seen_from, seen_to, low)
        store(scores + 4 * c, value)
        peaks = larger(peaks, value)
    before = read_f32(scratch + PEAKS + 4 * row)
    peak = max(before, max_lanes(peaks))
    mass = load(scratch + MASSES + 64 * row)
    if peak > before:
        fade = exp16(splat16(np.float32(before - peak)))
        mass = mass * fade
        sums = scratch + SUMS + row * ROW_BYTES
        for c in range(0, 4 * dim, 64):
            store(sums + c, load(sums + c) * fade)
        write_f32(scratch + PEAKS + 4 * row, peak)
    minus, zeros = splat16(peak), splat16(0.0)
    for c in range(0, keys, 16):
        value = exp16(load(scores + 4 * c) - minus)
        value = seen(value, c, seen_from, seen_to, zeros)
        store(scores + 4 * c, value)
        mass = mass + value
    store(scratch + MASSES + 64 * row, mass)


@helper
def finish_query(instruction, scratch, row, token, head):
    """Divide by the softmax's denominator, a sink's share in it, and write the result."""
    peak = read_f32(scratch + PEAKS + 4 * row)
    mass = sum_lanes(load(scratch + MASSES + 64 * row))
    sums, dim = scratch + SUMS + row * ROW_BYTES, get(instruction, Field.HEAD_DIM)
    sinks = get(instruction, Field.SINKS)
    if sinks != 0:
        sink = read_f32(sinks + 4 * head)
        highest = max(peak, sink)
        fade = np.exp(np.float64(peak - highest))
        mass = np.float32(mass * fade + np.exp(np.float64(sink - highest)))
        by = splat16(np.float32(fade / mass))
    else:
        by = splat16(np.float32(np.float32(1.0) / mass))
    out = get(instruction, Field.OUT)
    if out != 0:
        out += token * get(instruction, Field.OUT_STRIDE) + 4 * head * dim
        for c in range(0, dim - 15, 16):
            store(out + 4 * c, load(sums + 4 * c) * by)
        rest = dim % 16
        if rest != 0:
            last = sums + 4 * (dim - rest)
            store(last, load(last) * by)
            for c in range(dim - rest, dim):
                write_f32(out + 4 * c, read_f32(sums + 4 * c))
    if get(instruction, Field.GROUPS) != 0:
        for c in range(0, dim, 32):
            a, b = load(sums + 4 * c) * by, load(sums + 4 * c + 64) * by
            write_packs(instruction, token, (head * dim + c) // 32, a, b)


@helper
def cached_at(instruction, table, key):
    """Where a key's block of the head group starts, counted in tokens of all heads."""
    page = get(instruction, Field.PAGE)
    block = read_i32(table + 4 * (key // page))
    return block * get(instruction, Field.KV_HEADS) * page


@helper
def note_address(scratch, t, tile):
    write_i64(scratch + ADDRESSES + 8 * t, tile)


def make_rows(cache, isa, fresh, x_stride, out_stride):
    """The function that multiplies the tiles that were noted by all rows, a few at once; see
    `attend_tiles`."""
    most = ISAS[isa].rows

    @helper
    def multiply_rows(many, scratch, x, steps, out, rows):
        at = scratch + ADDRESSES
        for row in range(0, rows, most):
            x_row, out_row, count = (
                x + row * x_stride,
                out + row * out_stride,
                min(most, rows - row),
            )
            if many:
                attend_tiles(
                    isa, F32_CACHE, fresh, x_stride, out_stride, at, x_row, steps, out_row, count
                )
            else:
                attend_tiles(
                    isa, cache, fresh, x_stride, out_stride, at, x_row, steps, out_row, count
                )

    return multiply_rows


def make_spans(cache, isa):
    """The two products of a span of keys, for a cache of this kind: ``score_span``, ``mix_span``.

    Each takes `TILES` tiles at once and notes first where they lie. If ``many`` rows will multiply
    a tile it is widened to float32 there: that costs less than to do so for every few of them, and
    is exact.
    """
    size = CACHE_BYTES[cache]

    @helper
    def place_tile(tile, vectors, many, t, scratch):
        if many and size < 4:
            wide = scratch + WIDENED + 64 * MOST_DIMS * t
            for n in range(vectors):
                store(wide + 64 * n, load_dense(cache, tile + 16 * size * n))
            tile = wide
        note_address(scratch, t, tile)

    score_rows = make_rows(cache, isa, 1, ROW_BYTES, SPAN_BYTES)
    mix_rows = make_rows(cache, isa, 0, SPAN_BYTES, ROW_BYTES)

    @helper
    def score_span(instruction, scratch, table, group, at, skipped, keys, rows):
        """scores[row, key] = query[row] . key, for keys ``at + skipped`` to ``at + keys``.

        Four blocks at once; where fewer are left, the last one again: nobody looks at its scores.
        """
        page, dim = get(instruction, Field.PAGE), round_lanes(get(instruction, Field.HEAD_DIM))
        many = rows > FEW_ROWS
        for c in range(skipped, keys, 16 * TILES):
            for t in range(TILES):
                key = at + min(c + 16 * t, (keys - 1) // 16 * 16)
                place = cached_at(instruction, table, key) + group * page + key % page
                tile = get(instruction, Field.KEYS) + size * place * dim
                place_tile(tile, dim, many, t, scratch)
                value = get(instruction, Field.VALUES) + (tile - get(instruction, Field.KEYS))
                for line in range(0, size * 16 * dim, 64):
                    prefetch(value + line)
            score_rows(many, scratch, scratch + QUERIES, dim, scratch + SCORES + 4 * c, rows)

    @helper
    def mix_span(instruction, scratch, table, group, at, skipped, keys, rows):
        """sums[row] += numerator[row, key] * value[key]: 64 dims at once, the last ones again where
        fewer are left."""
        page, dim = get(instruction, Field.PAGE), round_lanes(get(instruction, Field.HEAD_DIM))
        many = rows > FEW_ROWS
        for c in range(skipped, keys, 16):
            place = (cached_at(instruction, table, at + c) + group * page) * dim
            place += (at + c) % page * 16
            steps = min(16, keys - c)  # what lies behind may be anything, even not a number
            for d in range(0, dim, 16 * TILES):
                for t in range(TILES):
                    column = page * min(d + 16 * t, dim - 16)
                    tile = get(instruction, Field.VALUES) + size * (place + column)
                    place_tile(tile, steps, many, t, scratch)
                x, out = scratch + SCORES + 4 * c, scratch + SUMS + 4 * d
                mix_rows(many, scratch, x, steps, out, rows)

    return score_span, mix_span


def make_attention(cache, isa):
    """The attention kernel for a cache of this kind. A unit is one query tile of one head group."""
    score_span, mix_span = make_spans(cache, isa)

    @helper
    def attend_queries(instruction, scratch, table, group, position, rows):
        """All keys that the gathered rows may see; the first row stands at ``position``."""
        share = get(instruction, Field.HEADS) // get(instruction, Field.KV_HEADS)
        window, dim = get(instruction, Field.WINDOW), round_lanes(get(instruction, Field.HEAD_DIM))
        scale = np.float32(read_f64(instruction + 8 * Field.SCALE))
        end = position + (rows - 1) // share + 1
        first_seen = max(0, position - window + 1) if window > 0 else 0
        for at in range(first_seen // SPAN * SPAN, end, SPAN):
            keys, skipped = min(SPAN, end - at), max(0, first_seen - at) // 64 * 64
            score_span(instruction, scratch, table, group, at, skipped, keys, rows)
            for row in range(rows):
                me = position + row // share - at
                seen_from = max(0, me - window + 1) if window > 0 else 0
                soften(scratch, row, seen_from, me + 1, keys, dim, scale)
            mix_span(instruction, scratch, table, group, at, skipped, keys, rows)

    def attention(instruction, params, start, stop, scratch):
        groups = get(instruction, Field.KV_HEADS)
        share = get(instruction, Field.HEADS) // groups
        units = get(params, Param.QUERY_TILES) * groups
        for turn in range(start, stop):
            unit = units - 1 - turn  # a long prompt's last tiles are its heaviest: they go first
            group = unit % groups
            s, tile_first = find_tile(instruction, params, unit // groups)
            end = read_i32(get(instruction, Field.STARTS) + 4 * s + 4)
            context = read_i32(get(instruction, Field.CONTEXTS) + 4 * s)
            table = get(instruction, Field.TABLES) + s * get(instruction, Field.TABLE_STRIDE)
            tile_end = min(end, tile_first + QUERY_TOKENS)
            for first in range(tile_first, tile_end, tile_tokens(share)):
                tokens = min(tile_tokens(share), tile_end - first)
                gather_queries(instruction, scratch, group, first, tokens)
                position, rows = context - (end - first), tokens * share
                attend_queries(instruction, scratch, table, group, position, rows)
                for row in range(rows):
                    head = group * share + row % share
                    finish_query(instruction, scratch, row, first + row // share, head)

    return attention
