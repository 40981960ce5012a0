"""The largest numbers of a row: where the first is, and the threshold that a filter draws.

Nothing is sorted. A threshold is found digit by digit (`find_cut`): sum up what falls in each bin
of 2048, walk down from the top to the bin where the goal is reached, and look at that bin alone,
twice more. Most of a row cannot matter and is passed over sixteen at a time.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types

from ruvon.kernels.cpu.arguments import Argmax
from ruvon.kernels.cpu.jit import simd as v
from ruvon.kernels.cpu.jit.llvm import F32, I32, I64, Builder, number
from ruvon.kernels.cpu.jit.simd import V, operation
from ruvon.kernels.cpu.jit.translate import helper
from ruvon.kernels.cpu.params import TILE

BINS, BIN_BITS = 0, 11  # in scratch: 2048 float64
PEAKS = 8 << BIN_BITS  # in scratch, behind them: a float32 for each tile


# The first


@helper
def first_in_row(x, width, wanted):
    """Where a row first has this number, or a NaN if that is what is wanted."""
    at = 0
    if wanted == wanted:
        while at + 16 <= width and not v.any_within(v.load(x + 4 * at), wanted, wanted):
            at += 16
    while at < width - 1:
        value = v.read_f32(x + 4 * at)
        if value == wanted or (wanted != wanted and value != value):
            return at
        at += 1
    return at


def argmax(address, params, start, stop, scratch):
    """Where each row is largest, the first place if there are several, as int64. A NaN counts as
    larger than any number, as in numpy."""
    a = v.arguments(Argmax, address)
    for row in range(start, stop):
        x = v.row_at(a.x, row)
        v.write_i64(a.out + 8 * row, first_in_row(x, a.width, largest(x, a.width)))


@helper
def largest(x, width):
    """The largest number, or NaN if there is one."""
    whole = width // 16 * 16
    best = v.keep_first(v.load(x + 4 * whole), width - whole, -np.inf)
    nothing = v.keep_first(v.load(x + 4 * whole), width - whole, 0.0) * 0.0
    for at in range(0, whole, 16):
        value = v.load(x + 4 * at)
        best = v.larger(best, value)
        nothing = v.fma(value, 0.0, nothing)
    found = v.max_lanes(best)
    if v.sum_lanes(nothing) != 0:  # a NaN or an infinity
        for at in range(width):
            found = found if found != found else max_or_nan(found, v.read_f32(x + 4 * at))
    return found


@helper
def max_or_nan(x, y):
    return y if y != y or y > x else x


# Thresholds


def flip_negative(b: Builder, bits: ir.Value) -> ir.Value:
    """Between a float's bits, as a signed integer, and an integer of the same order."""
    return b.select(b.icmp_signed("<", bits, number(0)), b.xor(bits, number(0x7FFFFFFF)), bits)


def emit_order(b: Builder, x: ir.Value) -> ir.Value:
    x = b.fadd(x, ir.Constant(F32, 0.0))  # which makes -0 a 0
    return b.add(flip_negative(b, b.sext(b.bitcast(x, I32), I64)), number(1 << 31))


def emit_float(b: Builder, order: ir.Value) -> ir.Value:
    bits = flip_negative(b, b.sub(order, number(1 << 31)))
    return b.bitcast(b.trunc(bits, I32), F32)


# (x, cut, kept, other): lanes of ``kept`` where x reaches ``cut``, the rest of ``other``
where_at_least = operation(
    lambda b, x, cut, kept, other: b.select(b.fcmp_ordered(">=", x, cut), kept, other), V, V, V, V
)
# An integer from 0 to below 2 ** 32, larger for larger floats; equal ones have the same
order_of = operation(emit_order, types.float32, result=types.intp)
float_at = operation(emit_float, types.intp, result=types.float32)  # of an order


@helper
def fill_bins(x, width, low, high, above, shift, by_mass, bins):
    """Sum up those from ``low`` to ``high`` that begin with the digits ``above``, by their next
    digit. By mass each counts as much as it is, else 1."""
    for bin in range(1 << BIN_BITS):
        v.write_f64(bins + 8 * bin, 0.0)
    mask = (1 << BIN_BITS) - 1
    for start in range(0, width, 16):
        if not v.any_within(v.load(x + 4 * start), low, high):
            continue
        for at in range(start, min(start + 16, width)):
            value = v.read_f32(x + 4 * at)
            order = order_of(value)
            if low <= value <= high and order >> (shift + BIN_BITS) == above:
                bin = bins + 8 * (order >> shift & mask)
                v.write_f64(bin, v.read_f64(bin) + (np.float64(value) if by_mass else 1.0))


@helper
def walk_down(bins, goal):
    """The highest bin at which the sum from the top reaches ``goal``, and what is still wanted
    there. Rounding may leave a little wanted in the end: then it is the last that has anything."""
    last, wanted = 0, goal
    for bin in range((1 << BIN_BITS) - 1, -1, -1):
        inside = v.read_f64(bins + 8 * bin)
        if inside != 0:
            last, wanted = bin, min(goal, inside)
            if inside >= goal:
                break
            goal -= inside
    return last, wanted


@helper
def find_cut(x, width, low, high, goal, by_mass, scratch):
    """Of the numbers from ``low`` to ``high`` (there must be one), going down from the largest:
    the number at which their sum or count reaches ``goal``, and how much of that is contributed by
    those equal to it."""
    bins, above = scratch + BINS, 0
    for shift in (2 * BIN_BITS, BIN_BITS, 0):
        fill_bins(x, width, low, high, above, shift, by_mass, bins)
        digit, goal = walk_down(bins, goal)
        above = (above << BIN_BITS) + digit
        low = max(low, float_at(above << shift))
        high = min(high, float_at((above + 1) << shift))
    return low, goal


@helper
def max_of(x, width):
    """The largest of some numbers that are no NaN."""
    whole = width // 16 * 16
    best = v.keep_first(v.load(x + 4 * whole), width - whole, -np.inf)
    for at in range(0, whole, 16):
        best = v.larger(v.load(x + 4 * at), best)
    return v.max_lanes(best)


@helper
def cut_of_largest(x, width, count, scratch):
    """The ``count``-th largest number, and how many equal to it are among the largest.

    As many numbers as tiles reach the count-th highest peak, so nothing below that is looked at.
    """
    tiles, peaks = (width + TILE - 1) // TILE, scratch + PEAKS
    low, high, goal = np.float32(-np.inf), np.float32(np.inf), np.float64(count)
    if count <= tiles:
        for tile in range(tiles):
            first = tile * TILE
            v.write_f32(peaks + 4 * tile, max_of(x + 4 * first, min(TILE, width - first)))
        low, _ = find_cut(peaks, tiles, low, high, goal, False, scratch)
    cut, ties = find_cut(x, width, low, high, goal, False, scratch)
    return cut, int(ties)


@helper
def drop_ties(x, width, cut, kept, instead):
    """Replace those equal to ``cut``, all but the first ``kept``."""
    for start in range(0, width, 16):
        if v.any_within(v.load(x + 4 * start), cut, cut):
            for at in range(start, min(start + 16, width)):
                if v.read_f32(x + 4 * at) == cut:
                    kept -= 1
                    if kept < 0:
                        v.write_f32(x + 4 * at, instead)


@helper
def list_largest(x, width, count, ids, scratch):
    """Write where the ``count`` largest numbers are, in order of index; of equals the first."""
    cut, ties = cut_of_largest(x, width, count, scratch)
    for start in range(0, width, 16):
        if v.any_within(v.load(x + 4 * start), cut, np.inf):
            for at in range(start, min(start + 16, width)):
                value = v.read_f32(x + 4 * at)
                ties -= 1 if value == cut else 0
                if value > cut or (value == cut and ties >= 0):
                    v.write_i32(ids, at)
                    ids += 4
