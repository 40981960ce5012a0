"""Activations become small integers: 32 numbers at a time, with a scale of their own."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ruvon.kernels.cpu.formats import LANES, NEGATED, NEGATED_HALF, SCALE, TOTAL, Form
from ruvon.kernels.cpu.jit.simd import (
    F32,
    I8,
    I16,
    I32,
    V,
    call,
    greater,
    offset,
    operation,
    splat,
    store_as,
    tree,
    vector,
)

F32V, I32V = vector(F32), vector(I32)


def quantize_lanes(b: ir.IRBuilder, x: ir.Value, by: ir.Value) -> ir.Value:
    """x * by rounded to the nearest integer (ties to even), plus a constant whose low half is 0:
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


def store_codes(b: ir.IRBuilder, codes: ir.Value, half: int, block: ir.Value, form: Form) -> None:
    """Sixteen codes, the first or second half of a group."""
    if form == Form.INT8:
        return store_as(b, offset(b, block, 16 * half), b.trunc(codes, vector(I8)), 1)
    order = [four + k for four in range(0, LANES, 4) for k in (0, 2, 1, 3)]
    words = b.trunc(codes, vector(I16))
    words = b.shuffle_vector(words, words, ir.Constant(I32V, order))
    return store_as(b, offset(b, block, 32 * half), words, 1)


def quantize_to(form: Form) -> Any:
    """The function that writes 32 floats as one group of a packed row: codes, scale, and the sums
    of codes."""

    def emit(b: ir.IRBuilder, x: ir.Value, y: ir.Value, block: ir.Value) -> None:
        sizes = [call(b, "llvm.fabs.v16f32", F32V, [value]) for value in (x, y)]
        peak = tree(b, greater(b, *sizes), greater)
        some = b.fcmp_ordered(">", peak, ir.Constant(F32, 0.0))
        inverse = b.fdiv(ir.Constant(F32, 127.0), peak)
        by = splat(b, b.select(some, inverse, ir.Constant(F32, 0.0)))
        lanes = [quantize_lanes(b, value, by) for value in (x, y)]
        for half, codes in enumerate(lanes):
            store_codes(b, codes, half, block, form)
        first, second = sum_halves(b, *(b.sext(b.trunc(x, vector(I8)), I32V) for x in lanes))
        total, by_128 = b.add(first, second), ir.Constant(I32, -128)
        tail = {
            SCALE: b.fmul(peak, ir.Constant(F32, 1 / 127)),
            TOTAL: b.sitofp(total, F32),
            NEGATED: b.mul(total, by_128),
            NEGATED_HALF: b.mul(first, by_128),
        }
        for at, value in tail.items():
            store_as(b, offset(b, block, form.tail + at), value, 4)

    return operation(emit, V, V, types.intp, result=types.void)


quantize_bytes, quantize_words = quantize_to(Form.INT8), quantize_to(Form.INT16)
