"""The matrix product's outer loops: which tile meets which rows, and what happens to the sums.

A unit is 32 outputs (two tiles; four if a gate's and its partner's) of one panel of rows. Rows
within a panel stay in the second-level cache while one unit after another streams its weights.
"""

from __future__ import annotations

from ruvon.kernels.cpu.arguments import Linear
from ruvon.kernels.cpu.formats import FORMATS, GROUP, ROWS, Form
from ruvon.kernels.cpu.isa import ISAS
from ruvon.kernels.cpu.jit.rows import activate16, write_row
from ruvon.kernels.cpu.jit.simd import arguments, get, load, read_i64, write_i64
from ruvon.kernels.cpu.jit.tiles import multiply_tile
from ruvon.kernels.cpu.jit.translate import helper
from ruvon.kernels.cpu.params import FETCH_AT, FIRST_GATED, NONE, OWN_END, PANEL

AT_ONCE = 32  # rows that meet one tile after another: a tile stays in the first-level cache


@helper
def finish_row(a, sums, row, column):
    """Bias and activation of 32 outputs of one row."""
    x, y = load(sums), load(sums + 64)
    if a.bias != 0:
        x = x + load(a.bias + 128 * column)
        y = y + load(a.bias + 128 * column + 64)
    if a.activation >= FIRST_GATED:
        up_x, up_y = load(sums + 128), load(sums + 192)
        if a.bias != 0:
            bias = a.bias + 4 * a.width + 128 * column
            up_x = up_x + load(bias)
            up_y = up_y + load(bias + 64)
        x, y = activate16(x, a.activation) * up_x, activate16(y, a.activation) * up_y
    elif a.activation != NONE:
        x, y = activate16(x, a.activation), activate16(y, a.activation)
    write_row(a.out, row, column, x, y)


@helper
def next_tiles(scratch, unit, own, size):
    """Where this thread's tiles behind those of ``unit``, at ``own``, lie: in this product or, at
    the end of its share, in the next. So memory never rests while products follow each other."""
    if unit + 1 < read_i64(scratch + OWN_END):
        return own + size
    at = read_i64(scratch + FETCH_AT)
    if at == 0:
        return own
    write_i64(scratch + FETCH_AT, at + size)
    return at


@helper
def is_plain(a):
    """Whether sums are what is wanted, as plain rows."""
    return a.bias | a.out.int8 | a.out.int16 | a.out.bf16 == 0 and a.activation == NONE


def make_linear(kind, isa):
    """The product with weights of this format."""
    form, most = ISAS[isa].form(FORMATS[kind]), ISAS[isa].rows
    x_row = 4 if form == Form.INTERLEAVED else form.group_bytes  # from one row to the next
    x_step = ROWS * form.group_bytes * FORMATS[kind].step // GROUP

    @helper
    def multiply(w, x, steps, out, out_stride, rows, fetch):
        """One tile by some rows; those that come first fetch what comes next."""
        for row in range(0, rows, most):
            at = x + row // ROWS * steps * x_step + row % ROWS * x_row
            count = min(most, rows - row)
            multiply_tile(isa, kind, w, at, steps, out + row * out_stride, out_stride, count, fetch)
            fetch = w

    @helper
    def multiply_rows(a, w, fetch, partner, first, count, column, sums):
        """A unit's tiles by the ``count`` rows from ``first`` on. What is fetched meanwhile begins
        at ``fetch`` and, for partners of gates, at ``partner``; 0 if it has been before."""
        plain, steps, tile_bytes = is_plain(a), a.weight.steps, a.weight.tile_bytes
        stride, x = 256, a.x + first // ROWS * steps * x_step
        if plain:
            stride, sums = a.out.stride, a.out.rows + first * a.out.stride + 128 * column
        for tile in range(4 if a.gate_bytes != 0 else 2):
            at = w + (tile & 1) * tile_bytes + (tile >> 1) * a.gate_bytes
            ahead = (partner if tile > 1 else fetch) + (tile & 1) * tile_bytes
            if fetch == 0:
                ahead = at
            multiply(at, x, steps, sums + 64 * tile, stride, count, ahead)
        if not plain:
            for row in range(count):
                finish_row(a, sums + row * stride, first + row, column)

    def linear(address, params, start, stop, scratch):
        a = arguments(Linear, address)
        rows, unit_bytes = get(params, a.counted), 2 * a.weight.tile_bytes
        for unit in range(start, stop):
            column, panel = unit % a.columns, unit // a.columns
            w = a.weight.tiles + column * unit_bytes
            fetch, partner = next_tiles(scratch, unit, w, unit_bytes), 0
            if a.gate_bytes != 0:
                partner = next_tiles(scratch, unit, w + a.gate_bytes, unit_bytes)
            for first in range(panel * PANEL, min(rows, (panel + 1) * PANEL), AT_ONCE):
                count = min(AT_ONCE, rows - first)
                multiply_rows(a, w, fetch, partner, first, count, column, scratch)
                fetch = 0

    return linear
