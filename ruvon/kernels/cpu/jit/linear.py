"""The matrix product's outer loops: which tile meets which rows, and what happens to the sums.

A unit is 32 outputs (two tiles; four if a gate's and its partner's) of one panel of rows. Rows
within a panel stay in the second-level cache while one unit after another streams its weights.
"""

from __future__ import annotations

from ruvon.kernels.cpu.isa import ISAS
from ruvon.kernels.cpu.jit.rows import activate16, sigmoid_times, write_packs
from ruvon.kernels.cpu.jit.simd import get, load, read_i64, store, write_i64
from ruvon.kernels.cpu.jit.tiles import multiply_tile
from ruvon.kernels.cpu.jit.translate import helper
from ruvon.kernels.cpu.kinds import GROUP, KINDS, ROWS, Form
from ruvon.kernels.cpu.program import (
    FETCH_AT,
    NONE,
    OWN_END,
    PANEL,
    SILU_GATED,
    Field,
    Param,
)

AT_ONCE = 32  # rows that meet one tile after another: a tile stays in the first-level cache


@helper
def finish_row(instruction, sums, row, column):
    """Bias, activation, then out as floats, packed, or both: 32 outputs of one row."""
    a, b = load(sums), load(sums + 64)
    bias, activation = get(instruction, Field.BIAS), get(instruction, Field.ACTIVATION)
    if bias != 0:
        a = a + load(bias + 128 * column)
        b = b + load(bias + 128 * column + 64)
    if activation == SILU_GATED:
        up = sums + 128
        c, d = load(up), load(up + 64)
        if bias != 0:
            up_bias = bias + 4 * get(instruction, Field.WIDTH) + 128 * column
            c = c + load(up_bias)
            d = d + load(up_bias + 64)
        a, b = sigmoid_times(a) * c, sigmoid_times(b) * d
    elif activation != NONE:
        a, b = activate16(a, activation), activate16(b, activation)
    out = get(instruction, Field.OUT)
    if out != 0:
        out += row * get(instruction, Field.OUT_STRIDE) + 128 * column
        store(out, a)
        store(out + 64, b)
    write_packs(instruction, row, column, a, b)


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
def is_plain(instruction):
    """Whether sums are what is wanted, as floats."""
    more = get(instruction, Field.BIAS) | get(instruction, Field.INT8)
    more |= get(instruction, Field.INT16) | get(instruction, Field.BF16)
    return more == 0 and get(instruction, Field.ACTIVATION) == NONE


def make_linear(kind, isa):
    """The product with weights of this kind, packed activations in, see `Field` for the rest."""
    form, most = ISAS[isa].form(KINDS[kind]), ISAS[isa].rows
    x_row = 4 if form == Form.FLOAT else form.group_bytes  # from one row to the next
    x_step = ROWS * form.group_bytes * KINDS[kind].step // GROUP

    @helper
    def multiply(w, x, steps, out, out_stride, rows, fetch):
        """One tile by some rows; those that come first fetch what comes next."""
        for row in range(0, rows, most):
            at = x + row // ROWS * steps * x_step + row % ROWS * x_row
            count = min(most, rows - row)
            multiply_tile(isa, kind, w, at, steps, out + row * out_stride, out_stride, count, fetch)
            fetch = w

    def linear(instruction, params, start, stop, scratch):
        counted = get(instruction, Field.COUNT)
        rows = get(params, counted - 1)  # the count of panels stands behind the count of rows
        columns = get(instruction, Field.PER_COUNT)
        steps, tile_bytes = get(instruction, Field.STEPS), get(instruction, Field.TILE_BYTES)
        gate, plain = get(instruction, Field.GATE_BYTES), is_plain(instruction)
        stride = get(instruction, Field.OUT_STRIDE) if plain else 256
        for unit in range(start, stop):
            column, panel = unit % columns, unit // columns
            w = get(instruction, Field.WEIGHT) + 2 * column * tile_bytes
            fetch = next_tiles(scratch, unit, w, 2 * tile_bytes)
            partner = next_tiles(scratch, unit, w + gate, 2 * tile_bytes) if gate != 0 else 0
            for first in range(panel * PANEL, min(rows, (panel + 1) * PANEL), AT_ONCE):
                count = min(AT_ONCE, rows - first)
                x = get(instruction, Field.X) + first // ROWS * steps * x_step
                sums = scratch
                if plain:
                    sums = get(instruction, Field.OUT) + first * stride + 128 * column
                for tile in range(4 if gate != 0 else 2):
                    behind = (tile & 1) * tile_bytes + (tile >> 1) * gate
                    ahead = (partner if tile > 1 else fetch) + (tile & 1) * tile_bytes
                    if first > panel * PANEL:  # there is nothing left to fetch
                        ahead = w + behind
                    multiply(w + behind, x, steps, sums + 64 * tile, stride, count, ahead)
                if not plain:
                    for row in range(count):
                        finish_row(instruction, sums + row * stride, first + row, column)

    return linear


assert Param.TOKEN_PANELS == Param.TOKENS + 1
assert Param.LOGIT_PANELS == Param.LOGIT_ROWS + 1
