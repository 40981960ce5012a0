"""The matrix product's outer loops: which tile meets which rows, and what happens to the sums.

A unit is 32 outputs (two tiles; four if a gate's and its partner's) of one panel of rows. Rows
within a panel stay in the second-level cache while one unit after another streams its weights.
"""

from __future__ import annotations

from ruvon.kernels.cpu.arguments import Attention, Linear
from ruvon.kernels.cpu.formats import ROWS, Form, TileFormat
from ruvon.kernels.cpu.isa import Isa
from ruvon.kernels.cpu.jit import simd as v
from ruvon.kernels.cpu.jit.rows import activate16, gated, is_packed, write_row
from ruvon.kernels.cpu.jit.tiles import make_multiply_tile
from ruvon.kernels.cpu.jit.translate import helper
from ruvon.kernels.cpu.params import NONE, PANEL, Note

PIECE = 2048  # bytes of keys or values that are asked for at once
AT_ONCE = 32  # rows that meet one tile after another: a tile stays in the first-level cache


@helper
def finish_row(a, bias, sums, row, column):
    """Bias and activation of 32 outputs of one row. Their bias is at ``bias`` if there is one."""
    x, y = v.load(sums), v.load(sums + 64)
    if bias != 0:
        x = x + v.load(bias)
        y = y + v.load(bias + 64)
    if a.gate_bytes != 0:
        up_x, up_y = v.load(sums + 128), v.load(sums + 192)
        if bias != 0:
            up_x = up_x + v.load(bias + 4 * a.width)
            up_y = up_y + v.load(bias + 4 * a.width + 64)
        x, y = gated(x, up_x, a.activation), gated(y, up_y, a.activation)
    elif a.activation != NONE:
        x, y = activate16(x, a.activation), activate16(y, a.activation)
    write_row(a.out, row, column, x, y)


@helper
def tiles_of_next(scratch, own, size):
    """Where this thread's first tiles of the next product lie; its ``own`` if nobody knows. So
    memory never rests while products follow each other."""
    at = v.read_i64(scratch + Note.FETCH_AT)
    if at == 0:
        return own
    v.write_i64(scratch + Note.FETCH_AT, at + size)
    return at


@helper
def two_of_next(a, scratch, w, size):
    """The same for a gate's tiles and its partner's, if there is one."""
    fetch = tiles_of_next(scratch, w, size)
    if a.gate_bytes == 0:
        return fetch, fetch
    return fetch, tiles_of_next(scratch, w + a.gate_bytes, size)


@helper
def fetch_cache(scratch):
    """Ask for some of the keys and values that the next attention will read. Memory rests while
    several rows meet a tile, and attention of single tokens does little but wait for it."""
    at, s = v.read_i64(scratch + Note.CACHE_FOR), v.read_i64(scratch + Note.CACHE_SEQUENCE)
    if at == 0 or s < 0 or v.read_i64(scratch + Note.CACHE_LEFT) <= 0:
        return
    a = v.arguments(Attention, at)
    block, inside = v.read_i64(scratch + Note.CACHE_BLOCK), v.read_i64(scratch + Note.CACHE_INSIDE)
    place = v.read_i32(a.tables + s * a.table_stride + 4 * block) * a.block_bytes + inside
    place += a.cache.keys if inside < a.block_bytes else a.cache.values - a.block_bytes
    for line in range(0, PIECE, 64):
        v.prefetch(place + line)
    inside += PIECE
    if inside >= 2 * a.block_bytes:
        block, inside = block + 1, 0
        if block * a.cache.page >= v.read_i32(a.contexts + 4 * s):
            block = 0
            v.write_i64(scratch + Note.CACHE_SEQUENCE, s - v.read_i64(scratch + Note.CACHE_TURN))
        v.write_i64(scratch + Note.CACHE_BLOCK, block)
    v.write_i64(scratch + Note.CACHE_INSIDE, inside)
    v.write_i64(scratch + Note.CACHE_LEFT, v.read_i64(scratch + Note.CACHE_LEFT) - PIECE)


@helper
def is_plain(a):
    """Whether sums are what is wanted, as plain rows."""
    return a.bias == 0 and a.activation == NONE and not is_packed(a.out)


def make_product(kind: TileFormat, isa: Isa):
    """The function that multiplies some rows by the tiles of a unit with weights of this format."""
    most, unpacked, group_bytes = isa.rows, kind.form == Form.ROWS, kind.form.group_bytes
    multiply_tile = make_multiply_tile(isa, kind)

    @helper
    def place_of(a, row):
        """Where a row of activations is."""
        if unpacked:
            return v.row_at(a.x, row)
        return a.x.at + (row // ROWS * a.weight.steps * ROWS + row % ROWS) * group_bytes

    @helper
    def multiply(a, w, first, rows, out, out_stride, fetch, scratch):
        """One tile by some rows; those that come first fetch what comes next."""
        steps, stride = a.weight.steps, a.x.stride
        for row in range(0, rows, most):
            if row > 0:
                fetch_cache(scratch)
            x, to, count = place_of(a, first + row), out + row * out_stride, min(most, rows - row)
            multiply_tile(w, x, stride, steps, to, out_stride, count, fetch)
            fetch = w

    @helper
    def multiply_rows(a, bias, w, fetch, partner, first, last, column, scratch):
        """A unit's tiles by the rows from ``first`` to below ``last``. What the first of them fetch
        begins at ``fetch`` and, for partners of gates, at ``partner``."""
        plain, tile_bytes = is_plain(a), a.weight.tile_bytes
        for some in range(first, last, AT_ONCE):
            sums, stride, count = scratch, 256, min(AT_ONCE, last - some)
            if plain:
                sums, stride = v.row_at(a.out.rows, some) + 128 * column, a.out.rows.stride
            for tile in range(4 if a.gate_bytes != 0 else 2):
                at = w + (tile & 1) * tile_bytes + (tile >> 1) * a.gate_bytes
                ahead = (partner if tile > 1 else fetch) + (tile & 1) * tile_bytes
                ahead = ahead if some == first else at
                multiply(a, at, some, count, sums + 64 * tile, stride, ahead, scratch)
            for row in range(0 if plain else count):
                finish_row(a, bias, sums + row * stride, some + row, column)

    return multiply_rows


def make_linear(kind: TileFormat, isa: Isa):
    """The product with weights of this format."""
    multiply_rows = make_product(kind, isa)

    def linear(address, params, start, stop, scratch):
        a = v.arguments(Linear, address)
        rows, unit_bytes = v.get(params, a.counted), 2 * a.weight.tile_bytes
        for unit in range(start, stop):
            column, panel = unit % a.columns, unit // a.columns
            w = a.weight.tiles + column * unit_bytes
            bias = 0 if a.bias == 0 else a.bias + 128 * column
            fetch, partner = w + unit_bytes, w + unit_bytes + a.gate_bytes
            if unit + 1 >= v.read_i64(scratch + Note.OWN_END):
                fetch, partner = two_of_next(a, scratch, w, unit_bytes)
            last = min(rows, (panel + 1) * PANEL)
            multiply_rows(a, bias, w, fetch, partner, panel * PANEL, last, column, scratch)

    return linear
