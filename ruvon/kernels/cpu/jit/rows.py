"""Kernels that work row by row: packing activations, norms, embedding, small element-wise things.

A unit of work is one row, in all of them (see `program`).
"""

from __future__ import annotations

import numpy as np

from ruvon.kernels.cpu.jit.quantize import quantize_bytes, quantize_words
from ruvon.kernels.cpu.jit.simd import (
    absolute,
    any_equal,
    exp16,
    fma,
    get,
    keep_first,
    larger,
    load,
    max_lanes,
    read_bf16,
    read_f16,
    read_f32,
    read_f64,
    read_i8,
    read_i32,
    read_u8,
    splat16,
    store,
    store_lanes,
    sum_lanes,
    write_f32,
    write_i64,
)
from ruvon.kernels.cpu.jit.translate import helper
from ruvon.kernels.cpu.kinds import GROUP, KINDS, ROWS, SUPER, Form
from ruvon.kernels.cpu.program import GELU, GELU_TANH, RELU, SILU, SILU_GATED, Field

INT8_BYTES, INT16_BYTES, BF16_BYTES = (
    form.group_bytes for form in (Form.INT8, Form.INT16, Form.BF16)
)

# Packing


@helper
def write_packs(instruction, row, group, a, b):
    """32 numbers of a row, in each packed form that is asked for."""
    int8, int16 = get(instruction, Field.INT8), get(instruction, Field.INT16)
    bf16 = get(instruction, Field.BF16)
    block = (row // ROWS * get(instruction, Field.GROUPS) + group) * ROWS + row % ROWS
    if int8 != 0:
        quantize_bytes(a, b, int8 + block * INT8_BYTES)
    if int16 != 0:
        quantize_words(a, b, int16 + block * INT16_BYTES)
    if bf16 != 0:
        store_lanes(16, 1, bf16 + block * BF16_BYTES, a)
        store_lanes(16, 1, bf16 + block * BF16_BYTES + 32, b)


def pack(instruction, params, start, stop, scratch):
    """Pack rows for a product that takes them by groups of 32."""
    for row in range(start, stop):
        x = get(instruction, Field.X) + row * get(instruction, Field.X_STRIDE)
        for group in range(get(instruction, Field.GROUPS)):
            at = x + 128 * group
            write_packs(instruction, row, group, load(at), load(at + 64))


def interleave(instruction, params, start, stop, scratch):
    """Pack rows for a product in float32: eight side by side for each k."""
    width = get(instruction, Field.GROUPS) * GROUP
    for row in range(start, stop):
        x = get(instruction, Field.X) + row * get(instruction, Field.X_STRIDE)
        pack = get(instruction, Field.OUT) + (row // ROWS) * width * 4 * ROWS + (row % ROWS) * 4
        for k in range(width):
            write_f32(pack + 4 * ROWS * k, read_f32(x + 4 * k))


# Norms


@helper
def sum_with_residual(x, residual, total, stride):
    """Write x + residual where there is one; returns where the sum can be read."""
    if residual == 0:
        return x
    for c in range(0, stride, 64):
        store(total + c, load(x + c) + load(residual + c))
    return total


@helper
def finish_norm(instruction, source, row, scale, shift):
    """(source - shift) * scale * weight (+ bias), as floats, packed, or both."""
    weight, bias = get(instruction, Field.WEIGHT), get(instruction, Field.BIAS)
    out, stride = get(instruction, Field.OUT), get(instruction, Field.X_STRIDE)
    if out != 0:
        out += row * stride
    minus, by = splat16(shift), splat16(scale)
    for c in range(0, stride, 128):
        a = (load(source + c) - minus) * by * load(weight + c)
        b = (load(source + c + 64) - minus) * by * load(weight + c + 64)
        if bias != 0:
            a = a + load(bias + c)
            b = b + load(bias + c + 64)
        if out != 0:
            store(out + c, a)
            store(out + c + 64, b)
        write_packs(instruction, row, c // 128, a, b)


@helper
def norm_row(instruction, row, centered):
    stride, width = get(instruction, Field.X_STRIDE), get(instruction, Field.WIDTH)
    x, residual = get(instruction, Field.X) + row * stride, get(instruction, Field.Y)
    if residual != 0:
        residual += row * stride
    source = sum_with_residual(x, residual, get(instruction, Field.TOTAL) + row * stride, stride)
    mean = np.float32(0.0)
    if centered:
        sums = splat16(0.0)
        for c in range(0, stride, 64):
            sums = sums + load(source + c)
        mean = np.float32(sum_lanes(sums) / np.float32(width))
    squares, minus, zeros = splat16(0.0), splat16(mean), splat16(0.0)
    for c in range(0, stride, 64):
        away = keep_first(load(source + c) - minus, width - c // 4, zeros)
        squares = fma(away, away, squares)
    eps = read_f64(instruction + 8 * Field.EPS)
    scale = np.float32(1.0 / np.sqrt(sum_lanes(squares) / np.float32(width) + eps))
    finish_norm(instruction, source, row, scale, mean)


def rms_norm(instruction, params, start, stop, scratch):
    for row in range(start, stop):
        norm_row(instruction, row, False)


def layer_norm(instruction, params, start, stop, scratch):
    for row in range(start, stop):
        norm_row(instruction, row, True)


# Activations


@helper
def sigmoid_times(x):
    one = splat16(1.0)
    return x / (one + exp16(splat16(0.0) - x))


@helper
def erf16(x):
    """Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7."""
    one, size = splat16(1.0), absolute(x)
    t = one / fma(splat16(0.3275911), size, one)
    p = fma(splat16(1.061405429), t, splat16(-1.453152027))
    p = fma(p, t, splat16(1.421413741))
    p = fma(p, t, splat16(-0.284496736))
    p = fma(p, t, splat16(0.254829592))
    tail = p * t * exp16(splat16(0.0) - size * size)
    # the sign of x without a division by zero: x / (|x| + tiny) is 0 or nearly +-1
    return (one - tail) * (x / (size + splat16(1e-30)))


@helper
def activate16(x, activation):
    if activation == RELU:
        return larger(x, splat16(0.0))
    if activation == SILU:
        return sigmoid_times(x)
    if activation == GELU:
        half = splat16(0.5) * x
        return fma(half, erf16(x * splat16(0.7071067811865476)), half)
    if activation == GELU_TANH:
        inner = fma(x * x * x, splat16(0.044715), x) * splat16(1.5957691216057308)
        return sigmoid_of(x, inner)  # 0.5 x (1 + tanh(u)) = x sigmoid(2u)
    return x


@helper
def sigmoid_of(x, inner):
    return x / (splat16(1.0) + exp16(splat16(0.0) - inner))


def activate(instruction, params, start, stop, scratch):
    """The activation of a product that could not do it itself."""
    width, activation = get(instruction, Field.WIDTH), get(instruction, Field.ACTIVATION)
    zeros = splat16(0.0)
    for row in range(start, stop):
        x = get(instruction, Field.X) + row * get(instruction, Field.X_STRIDE)
        out = get(instruction, Field.OUT) + row * get(instruction, Field.OUT_STRIDE)
        for c in range(0, width, 16):
            value = load(x + 4 * c)
            if activation == SILU_GATED:
                value = sigmoid_times(value) * load(x + 4 * (width + c))
            else:
                value = activate16(value, activation)
            store(out + 4 * c, keep_first(value, width - c, zeros))


# Rows in and out


def add(instruction, params, start, stop, scratch):
    stride = get(instruction, Field.X_STRIDE)
    for row in range(start, stop):
        x, y = get(instruction, Field.X) + row * stride, get(instruction, Field.Y) + row * stride
        out = get(instruction, Field.OUT) + row * stride
        for c in range(0, stride, 64):
            store(out + c, load(x + c) + load(y + c))


def take(instruction, params, start, stop, scratch):
    stride = get(instruction, Field.X_STRIDE)
    for row in range(start, stop):
        x = get(instruction, Field.X) + read_i32(get(instruction, Field.IDS) + 4 * row) * stride
        out = get(instruction, Field.OUT) + row * stride
        for c in range(0, stride, 64):
            store(out + c, load(x + c))


def make_coded_value(kind):
    """The function that reads one value of a quantized tile (see `layout`)."""
    bits, zero, half, offsets = kind.bits, kind.zero, kind.half, kind.offsets
    step_bytes, group_bytes, table_bytes = (
        kind.step_bytes, kind.group_scale_bytes, kind.table_bytes
    )  # fmt: skip
    extra, parts, super_bytes = max(bits - 4, 1), kind.scales_per_group, kind.super_bytes
    two, single = kind.scales == "two", kind.scales == "f32"
    lower = np.int64(15)

    @helper
    def code_at(codes, lane, within):
        """The code of the k that is ``within`` the group at ``codes``."""
        q, place = within // 4, lane * 4 + within % 4
        if bits == 8:
            return read_u8(codes + q * 64 + place)
        code = read_u8(codes + q // 2 * 64 + place) >> (q % 2 * 4) & lower
        if bits > 4:
            each = 8 // extra
            byte = read_u8(codes + 256 + q // each * 64 + place)
            code += (byte >> (q % each * extra) & ((1 << extra) - 1)) << 4
        return code

    @helper
    def table_number(tables, over, lane, table, part):
        """A scale (``table`` 0) or an offset (1)."""
        number = table * parts + part
        if two:
            by = read_f16(over + table * 32 + 2 * lane)
            return np.float32(read_i8(tables + number * table_bytes + lane)) * by
        if single:
            return read_f32(tables + number * table_bytes + 4 * lane)
        return read_f16(tables + number * table_bytes + 2 * lane)

    @helper
    def coded_value(tile, lane, steps, k):
        group, within = k // 32, k % 32
        part = within // 16 if half else 0
        tables = tile + steps * step_bytes
        over = tables + steps * group_bytes + group // SUPER * super_bytes
        tables += group * group_bytes
        code = code_at(tile + group * step_bytes, lane, within)
        value = np.float32(code - zero) * table_number(tables, over, lane, 0, part)
        if offsets:
            value += table_number(tables, over, lane, 1, part)
        return value

    return coded_value


@helper
def dense_value(tile, lane, k, single, brain, pairs):
    if pairs:
        return read_bf16(tile + k // 2 * 64 + lane * 4 + k % 2 * 2)
    if single:
        return read_f32(tile + k * 64 + lane * 4)
    if brain:
        return read_bf16(tile + k * 32 + lane * 2)
    return read_f16(tile + k * 32 + lane * 2)


def make_embed(kind, isa):
    """The kernel that reads rows out of a table in tiles of this kind."""
    form = KINDS[kind]
    quantized, coded_value = form.quantized, make_coded_value(form)
    single, brain, pairs = form.storage == "f32", form.storage == "bf16", form.pairs

    def embed(instruction, params, start, stop, scratch):
        width, steps = get(instruction, Field.WIDTH), get(instruction, Field.STEPS)
        for row in range(start, stop):
            token = read_i32(get(instruction, Field.IDS) + 4 * row)
            tile = get(instruction, Field.WEIGHT)
            tile += token // 16 * get(instruction, Field.TILE_BYTES)
            out = get(instruction, Field.OUT) + row * get(instruction, Field.OUT_STRIDE)
            for k in range(width):
                if quantized:
                    value = coded_value(tile, token % 16, steps, k)
                else:
                    value = dense_value(tile, token % 16, k, single, brain, pairs)
                write_f32(out + 4 * k, value)

    return embed


@helper
def first_in_row(x, width, wanted):
    """Where a row first has this number, or a NaN if that is what is wanted."""
    at, sought = 0, splat16(wanted)
    if wanted == wanted:
        while at + 16 <= width and not any_equal(load(x + 4 * at), sought):
            at += 16
    while at < width - 1:
        value = read_f32(x + 4 * at)
        if value == wanted or (wanted != wanted and value != value):
            return at
        at += 1
    return at


def argmax(instruction, params, start, stop, scratch):
    """Where each row is largest, the first place if there are several, as int64. A NaN counts as
    larger than any number, as in numpy."""
    width, stride = get(instruction, Field.WIDTH), get(instruction, Field.X_STRIDE)
    low, zeros = splat16(-np.inf), splat16(0.0)
    for row in range(start, stop):
        x = get(instruction, Field.X) + row * stride
        whole = width // 16 * 16
        best = keep_first(load(x + 4 * whole), width - whole, low)
        nothing = keep_first(load(x + 4 * whole), width - whole, zeros) * zeros
        for c in range(0, 4 * whole, 64):
            value = load(x + c)
            best = larger(best, value)
            nothing = fma(value, zeros, nothing)
        wanted = max_lanes(best)
        if sum_lanes(nothing) != 0:  # a NaN or an infinity
            for at in range(width):
                wanted = wanted if wanted != wanted else max_or_nan(wanted, read_f32(x + 4 * at))
        write_i64(get(instruction, Field.OUT) + 8 * row, first_in_row(x, width, wanted))


@helper
def max_or_nan(x, y):
    return y if y != y or y > x else x
