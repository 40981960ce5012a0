"""Activations become small integers: 32 numbers at a time, with a scale of their own."""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types

from ruvon.kernels.cpu.formats import HALVES, LANES, SCALE, TOTAL
from ruvon.kernels.cpu.jit.llvm import F32, F32V, I8, I32, I32V, Builder, vector
from ruvon.kernels.cpu.jit.simd import V, operation


def quantize_lanes(b: Builder, x: ir.Value, by: ir.Value) -> ir.Value:
    """x * by rounded to the nearest integer (ties to even), plus a constant whose low half is 0:
    adding 1.5 * 2 ** 23 leaves the integer in a float's low bits."""
    shift = ir.Constant(F32V, [12582912.0] * LANES)
    return b.bitcast(b.fadd(b.fmul(x, by), shift), I32V)


def sum_halves(b: Builder, x: ir.Value, y: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The sums of x's and of y's lanes, folded together."""
    low, high = [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
    both = b.add(*(b.shuffle_vector(x, y, ir.Constant(I32V, part)) for part in (low, high)))
    for width in (4, 2, 1):
        moved = [lane ^ width for lane in range(LANES)]
        both = b.add(both, b.shuffle_vector(both, both, ir.Constant(I32V, moved)))
    return tuple(b.extract_element(both, ir.Constant(I32, lane)) for lane in (0, 8))


def emit_quantize(b: Builder, x: ir.Value, y: ir.Value, block: ir.Value) -> None:
    sizes = [b.invoke("llvm.fabs.v16f32", F32V, [value]) for value in (x, y)]
    peak = b.tree(b.greater(*sizes), b.greater)
    some = b.fcmp_ordered(">", peak, ir.Constant(F32, 0.0))
    inverse = b.fdiv(ir.Constant(F32, 127.0), peak)
    by = b.splat(b.select(some, inverse, ir.Constant(F32, 0.0)))
    codes = [b.trunc(quantize_lanes(b, value, by), vector(I8)) for value in (x, y)]
    for half, each in enumerate(codes):
        b.store_as(b.offset(block, LANES * half), each, 1)
    first, second = sum_halves(b, *(b.sext(each, I32V) for each in codes))
    # A NaN is larger than nothing, and no integer: without this it would pass for a number.
    lost = b.bitcast(b.fcmp_unordered("uno", x, y), ir.IntType(LANES))
    lost = b.icmp_unsigned("!=", lost, ir.Constant(ir.IntType(LANES), 0))
    scale = b.select(lost, ir.Constant(F32, math.nan), b.fmul(peak, ir.Constant(F32, 1 / 127)))
    b.store_as(b.offset(block, SCALE), scale, 4)
    for at, total in ((TOTAL, b.add(first, second)), (HALVES, first), (HALVES + 4, second)):
        b.store_as(b.offset(block, at), b.sitofp(total, F32), 4)


# Write 32 floats as one group of a packed row: codes, scale, and the sums of codes
quantize = operation(emit_quantize, V, V, types.intp, result=types.void)
