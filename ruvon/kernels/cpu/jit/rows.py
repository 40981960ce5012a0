"""Kernels that work row by row: packing activations, norms, embedding, small element-wise things.

A unit of work is one row, in all of them (see `arguments`).
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types

from ruvon.kernels.cpu.arguments import Copy, Norm
from ruvon.kernels.cpu.formats import HALVES, LANES, ROWS, SCALE, TOTAL, Form
from ruvon.kernels.cpu.jit import simd as v
from ruvon.kernels.cpu.jit.llvm import F32, F32V, I8, I32, I32V, Builder, vector
from ruvon.kernels.cpu.jit.simd import V, make_store, operation
from ruvon.kernels.cpu.jit.translate import helper
from ruvon.kernels.cpu.params import (
    GELU,
    GELU_TANH,
    GELU_TANH_GATED,
    NONE,
    RELU,
    SILU,
    SILU_GATED,
)

INT8_BYTES, BF16_BYTES = Form.INT8.group_bytes, Form.BF16.group_bytes
store_bf16 = make_store("bf16")

# Packing: activations become small integers, 32 numbers at a time, with a scale of their own


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


@helper
def is_packed(out):
    """Whether packed rows are asked for, in any form."""
    return out.int8 | out.bf16 != 0


@helper
def write_row(out, row, group, a, b):
    """32 numbers of a row, in each form that is asked for."""
    if out.rows.at != 0:
        at = v.row_at(out.rows, row) + 128 * group
        v.store(at, a)
        v.store(at + 64, b)
    block = (row // ROWS * out.groups + group) * ROWS + row % ROWS
    if out.int8 != 0:
        quantize(a, b, out.int8 + block * INT8_BYTES)
    if out.bf16 != 0:
        store_bf16(out.bf16 + block * BF16_BYTES, a)
        store_bf16(out.bf16 + block * BF16_BYTES + 32, b)


# Norms


@helper
def sum_with_residual(x, residual, total, stride):
    """Write x + residual where there is one; returns where the sum can be read."""
    if residual == 0:
        return x
    for c in range(0, stride, 64):
        v.store(total + c, v.load(x + c) + v.load(residual + c))
    return total


@helper
def finish_norm(a, source, row, scale, shift):
    """(source - shift) * scale * weight (+ bias)."""
    for c in range(0, a.x.stride, 128):
        x = (v.load(source + c) - shift) * scale * v.load(a.weight + c)
        y = (v.load(source + c + 64) - shift) * scale * v.load(a.weight + c + 64)
        if a.bias != 0:
            x = x + v.load(a.bias + c)
            y = y + v.load(a.bias + c + 64)
        write_row(a.out, row, c // 128, x, y)


@helper
def norm_row(a, row):
    x, residual, total = v.row_at(a.x, row), a.residual, a.total + row * a.x.stride
    if residual != 0:
        residual += row * a.x.stride
    source = sum_with_residual(x, residual, total, a.x.stride)
    mean, width = np.float32(0.0), np.float32(a.width)
    if a.bias != 0:
        sums = 0.0
        for c in range(0, a.x.stride, 64):
            sums = sums + v.load(source + c)
        mean = np.float32(v.sum_lanes(sums) / width)
    squares = 0.0
    for c in range(0, a.x.stride, 64):
        away = v.keep_first(v.load(source + c) - mean, a.width - c // 4, 0.0)
        squares = v.fma(away, away, squares)
    scale = np.float32(1.0 / np.sqrt(v.sum_lanes(squares) / width + a.eps))
    finish_norm(a, source, row, scale, mean)


def norm(address, params, start, stop, scratch):
    a = v.arguments(Norm, address)
    for row in range(start, stop):
        norm_row(a, row)


# Activations


@helper
def sigmoid_of(x, inner):
    """x times the sigmoid of ``inner``."""
    return x / (1.0 + v.exp16(0.0 - inner))


@helper
def gelu_tanh(x):
    """0.5 x (1 + tanh(u)) = x sigmoid(2u)."""
    return sigmoid_of(x, v.fma(x * x * x, 0.044715, x) * 1.5957691216057308)


@helper
def gated(gate, up, activation):
    """What a gate lets pass. Comparisons keep a NaN."""
    if activation == SILU_GATED:
        return sigmoid_of(gate, gate) * up
    if activation == GELU_TANH_GATED:
        return gelu_tanh(gate) * up
    gate = 0.0 - v.larger(-7.0, 0.0 - gate)
    up = v.larger(-7.0, 0.0 - v.larger(-7.0, 0.0 - up))
    return sigmoid_of(gate, gate * 1.702) * (up + 1.0)


@helper
def erf16(x):
    """Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7."""
    size = v.absolute(x)
    t = 1.0 / v.fma(0.3275911, size, 1.0)
    p = v.fma(1.061405429, t, -1.453152027)
    p = v.fma(p, t, 1.421413741)
    p = v.fma(p, t, -0.284496736)
    p = v.fma(p, t, 0.254829592)
    tail = p * t * v.exp16(0.0 - size * size)
    # the sign of x without a division by zero: x / (|x| + tiny) is 0 or nearly +-1
    return (1.0 - tail) * (x / (size + 1e-30))


@helper
def activate16(x, activation):
    if activation == RELU:
        return v.larger(x, 0.0)
    if activation == SILU:
        return sigmoid_of(x, x)
    if activation == GELU:
        half = 0.5 * x
        return v.fma(half, erf16(x * 0.7071067811865476), half)
    if activation == GELU_TANH:
        return gelu_tanh(x)
    return x


# Copies


@helper
def let_pass(a, row, group, x, y):
    """What 32 numbers of a gate let pass of those behind it; nothing beyond the end."""
    at, left = a.y + row * a.x.stride + 128 * group, a.width - 32 * group
    x, y = gated(x, v.load(at), a.activation), gated(y, v.load(at + 64), a.activation)
    return v.keep_first(x, left, 0.0), v.keep_first(y, left - 16, 0.0)


def copy(address, params, start, stop, scratch):
    """Rows, sums of two, or products with a gate, in whatever forms are asked for."""
    a = v.arguments(Copy, address)
    for row in range(start, stop):
        source = row if a.rows == 0 else v.read_i32(a.rows + 4 * row)
        at = source * a.x.stride
        for group in range(a.out.groups):
            x, y = v.load(a.x.at + at), v.load(a.x.at + at + 64)
            if a.activation != NONE:
                x, y = let_pass(a, source, group, x, y)
            elif a.y != 0:
                x, y = x + v.load(a.y + at), y + v.load(a.y + at + 64)
            write_row(a.out, row, group, x, y)
            at += 128
