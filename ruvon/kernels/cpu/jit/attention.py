"""Attention over the paged cache.

It works on one *query tile* at a time: up to 16 tokens of one sequence and the query heads
that share one key/value head. It walks the sequence's keys in spans of 128, counted from position
0, with a running maximum and sum (the "online" softmax). A span's scores are products of the tile
with blocks of keys, 16 keys across the lanes of a vector; keys that a row may not see count as
nothing at all, exactly. So a row's result depends on its own position and keys only: not on the
chunk it came in, its neighbours in the tile, or the batch.
"""

from __future__ import annotations

import numpy as np

from ruvon.kernels.cpu.arguments import Attention
from ruvon.kernels.cpu.formats import LANES, TileFormat
from ruvon.kernels.cpu.isa import Isa
from ruvon.kernels.cpu.jit import simd as v
from ruvon.kernels.cpu.jit.rows import write_row
from ruvon.kernels.cpu.jit.tiles import TILES, make_attend_tiles, make_load
from ruvon.kernels.cpu.jit.translate import helper
from ruvon.kernels.cpu.jit.write_kv import round_lanes
from ruvon.kernels.cpu.params import (
    MOST_DIMS,
    NOTES,
    QUERY_TOKENS,
    SCRATCH_BYTES,
    TILE_ROWS,
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
ADDRESSES = MASSES + TILE_ROWS * 64  # int64 [TILES]
WIDENED = ADDRESSES + 64  # float32 [TILES, MOST_DIMS, 16]: tiles of the cache
assert WIDENED + 64 * TILES * MOST_DIMS <= SCRATCH_BYTES - NOTES

FEW_ROWS = 8  # that multiply a tile of the cache as it is
LOWEST = np.float32(-1e30)  # below every score; not infinite, so that differences stay numbers


@helper
def tile_tokens(share):
    """Tokens of a query tile when ``share`` query heads share a key/value head."""
    return max(1, min(QUERY_TOKENS, TILE_ROWS // share))


@helper
def find_tile(starts, sequences, tile):
    """(sequence, its first token in this tile): tiles are numbered sequence by sequence."""
    for s in range(sequences):
        first, end = v.read_i32(starts + 4 * s), v.read_i32(starts + 4 * s + 4)
        tiles = (end - first + QUERY_TOKENS - 1) // QUERY_TOKENS
        if tile < tiles:
            return s, first + tile * QUERY_TOKENS
        tile -= tiles
    return 0, 0


@helper
def gather_queries(a, scratch, group, first, count):
    """Copy the tile's query rows together and clear its running state."""
    share = a.cache.heads // a.cache.kv_heads
    dim = round_lanes(a.cache.head_dim)
    for row in range(count * share):
        token, head = first + row // share, group * share + row % share
        source = v.row_at(a.queries, token) + 4 * head * dim
        for c in range(0, 4 * dim, 64):
            v.store(scratch + QUERIES + row * ROW_BYTES + c, v.load(source + c))
            v.store(scratch + SUMS + row * ROW_BYTES + c, 0.0)
        v.write_f32(scratch + PEAKS + 4 * row, LOWEST)
        v.store(scratch + MASSES + 64 * row, 0.0)


@helper
def seen(x, c, seen_from, seen_to, other):
    """Lanes of x that stand for keys from ``seen_from`` to ``seen_to``, x starting at key c."""
    if seen_from <= c and c + 16 <= seen_to:
        return x
    return v.keep_first(other, seen_from - c, v.keep_first(x, seen_to - c, other))


@helper
def soften(scratch, row, seen_from, seen_to, keys, dim, scale):
    """One row of one span: scores to numerators, in step with the running peak and mass.

    The row sees the span's keys ``seen_from`` to ``seen_to``; ``keys`` of them were computed.
    """
    scores, peaks = scratch + SCORES + row * SPAN_BYTES, LOWEST
    for c in range(0, keys, 16):
        value = seen(v.load(scores + 4 * c) * scale, c, seen_from, seen_to, LOWEST)
        v.store(scores + 4 * c, value)
        peaks = v.larger(peaks, value)
    before = v.read_f32(scratch + PEAKS + 4 * row)
    peak = max(before, v.max_lanes(peaks))
    mass = v.load(scratch + MASSES + 64 * row)
    if peak > before:
        fade = v.exp16(np.float32(before - peak))
        mass = mass * fade
        sums = scratch + SUMS + row * ROW_BYTES
        for c in range(0, 4 * dim, 64):
            v.store(sums + c, v.load(sums + c) * fade)
        v.write_f32(scratch + PEAKS + 4 * row, peak)
    for c in range(0, keys, 16):
        value = v.exp16(v.load(scores + 4 * c) - peak)
        value = seen(value, c, seen_from, seen_to, 0.0)
        v.store(scores + 4 * c, value)
        mass = mass + value
    v.store(scratch + MASSES + 64 * row, mass)


@helper
def share_of_one(scratch, row, sinks, head):
    """One by the softmax's denominator, a sink's share in it."""
    mass = v.sum_lanes(v.load(scratch + MASSES + 64 * row))
    if sinks == 0:
        return np.float32(np.float32(1.0) / mass)
    peak, sink = v.read_f32(scratch + PEAKS + 4 * row), v.read_f32(sinks + 4 * head)
    highest = max(peak, sink)
    fade = np.exp(np.float64(peak - highest))
    mass = np.float32(mass * fade + np.exp(np.float64(sink - highest)))
    return np.float32(fade / mass)


@helper
def finish_query(a, scratch, row, token, head):
    """Divide by the softmax's denominator and write the result."""
    sums, dim = scratch + SUMS + row * ROW_BYTES, a.cache.head_dim
    by = share_of_one(scratch, row, a.sinks, head)
    for c in range(0, 4 * dim, 64):
        v.store(sums + c, v.load(sums + c) * by)
    if dim % 32 == 0:
        for c in range(0, dim, 32):
            x, y = v.load(sums + 4 * c), v.load(sums + 4 * c + 64)
            write_row(a.out, token, (head * dim + c) // 32, x, y)
        return
    out = v.row_at(a.out.rows, token) + 4 * head * dim  # nothing else, see `operations`
    for c in range(0, 4 * dim, 4):
        v.write_f32(out + c, v.read_f32(sums + c))


@helper
def cached_at(cache, table, key, group):
    """Where a key's block of a head group starts, counted in tokens of all heads."""
    block = v.read_i32(table + 4 * (key // cache.page))
    return (block * cache.kv_heads + group) * cache.page


def make_rows(cache: TileFormat, isa: Isa, fresh: bool, x_stride: int, out_stride: int):
    """The function that multiplies the tiles that were noted by all rows, a few at once; see
    `make_attend_tiles`."""
    most = isa.rows
    attend_wide, attend_stored = (
        make_attend_tiles(isa, storage, fresh, x_stride, out_stride)
        for storage in ("f32", cache.storage)
    )

    @helper
    def multiply_rows(many, scratch, x, steps, out, rows):
        tiles = scratch + ADDRESSES
        for row in range(0, rows, most):
            count, at, to = min(most, rows - row), x + row * x_stride, out + row * out_stride
            if many:
                attend_wide(tiles, at, steps, to, count)
            else:
                attend_stored(tiles, at, steps, to, count)

    return multiply_rows


def make_spans(cache: TileFormat, isa: Isa):
    """The two products of a span of keys, for a cache of this kind: ``score_span``, ``mix_span``.

    Each takes `TILES` tiles at once and notes first where they lie. If ``many`` rows will multiply
    a tile it is widened to float32 there: that costs less than to do so for every few of them, and
    is exact.
    """
    size, load_stored = cache.step_bytes // LANES, make_load(cache.storage)

    @helper
    def place_tile(tile, vectors, many, t, scratch):
        if many and size < 4:
            wide = scratch + WIDENED + 64 * MOST_DIMS * t
            for n in range(vectors):
                v.store(wide + 64 * n, load_stored(tile + 16 * size * n))
            tile = wide
        v.write_i64(scratch + ADDRESSES + 8 * t, tile)

    score_rows = make_rows(cache, isa, True, ROW_BYTES, SPAN_BYTES)
    mix_rows = make_rows(cache, isa, False, SPAN_BYTES, ROW_BYTES)

    @helper
    def score_span(cached, scratch, table, group, at, skipped, keys, rows):
        """scores[row, key] = query[row] . key, for keys ``at + skipped`` to ``at + keys``.

        Four blocks at once; where fewer are left, the last one again: nobody looks at its scores.
        """
        dim, many = round_lanes(cached.head_dim), rows > FEW_ROWS
        for c in range(skipped, keys, 16 * TILES):
            for t in range(TILES):
                key = at + min(c + 16 * t, (keys - 1) // 16 * 16)
                place = cached_at(cached, table, key, group) + key % cached.page
                tile, value = cached.keys + size * place * dim, cached.values + size * place * dim
                place_tile(tile, dim, many, t, scratch)
                for line in range(0, size * 16 * dim, 64):
                    v.prefetch(value + line)
            score_rows(many, scratch, scratch + QUERIES, dim, scratch + SCORES + 4 * c, rows)

    @helper
    def mix_span(cached, scratch, table, group, at, skipped, keys, rows):
        """sums[row] += numerator[row, key] * value[key]: 64 dims at once, the last ones again where
        fewer are left."""
        dim, many = round_lanes(cached.head_dim), rows > FEW_ROWS
        for c in range(skipped, keys, 16):
            place = cached_at(cached, table, at + c, group) * dim + (at + c) % cached.page * 16
            steps = min(16, keys - c)  # what lies behind may be anything, even not a number
            for d in range(0, dim, 16 * TILES):
                for t in range(TILES):
                    column = cached.page * min(d + 16 * t, dim - 16)
                    tile = cached.values + size * (place + column)
                    place_tile(tile, steps, many, t, scratch)
                x, out = scratch + SCORES + 4 * c, scratch + SUMS + 4 * d
                mix_rows(many, scratch, x, steps, out, rows)

    return score_span, mix_span


def make_attention(cache: TileFormat, isa: Isa):
    """The attention kernel for a cache of this kind. A unit is one query tile of one head group."""
    score_span, mix_span = make_spans(cache, isa)

    @helper
    def attend_queries(a, scratch, table, group, position, rows):
        """All keys that the gathered rows may see; the first row stands at ``position``."""
        share, window, dim = a.cache.heads // a.cache.kv_heads, a.window, a.cache.head_dim
        scale, dim = np.float32(a.scale), round_lanes(dim)
        end = position + (rows - 1) // share + 1
        first_seen = max(0, position - window + 1) if window > 0 else 0
        for at in range(first_seen // SPAN * SPAN, end, SPAN):
            keys, skipped = min(SPAN, end - at), max(0, first_seen - at) // 64 * 64
            score_span(a.cache, scratch, table, group, at, skipped, keys, rows)
            for row in range(rows):
                me = position + row // share - at
                seen_from = max(0, me - window + 1) if window > 0 else 0
                soften(scratch, row, seen_from, me + 1, keys, dim, scale)
            # No row sees what comes before, whosever that is: nothing times NaN is NaN.
            skipped = max(0, first_seen - at) // 16 * 16
            mix_span(a.cache, scratch, table, group, at, skipped, keys, rows)

    @helper
    def attend_tile(a, scratch, s, group, tile_first):
        """The queries of one sequence ``s`` and head group from ``tile_first`` on."""
        share, table = a.cache.heads // a.cache.kv_heads, a.tables + s * a.table_stride
        end, context = v.read_i32(a.starts + 4 * s + 4), v.read_i32(a.contexts + 4 * s)
        tile_end = min(end, tile_first + QUERY_TOKENS)
        for first in range(tile_first, tile_end, tile_tokens(share)):
            tokens = min(tile_tokens(share), tile_end - first)
            gather_queries(a, scratch, group, first, tokens)
            attend_queries(a, scratch, table, group, context - (end - first), tokens * share)
            for row in range(tokens * share):
                finish_query(a, scratch, row, first + row // share, group * share + row % share)

    def attention(address, params, start, stop, scratch):
        a = v.arguments(Attention, address)
        groups, sequences = a.cache.kv_heads, v.get(params, Param.SEQUENCES)
        units = v.get(params, Param.QUERY_TILES) * groups
        for turn in range(start, stop):
            unit = units - 1 - turn  # a long prompt's last tiles are its heaviest: they go first
            s, tile_first = find_tile(a.starts, sequences, unit // groups)
            attend_tile(a, scratch, s, unit % groups, tile_first)

    return attention
