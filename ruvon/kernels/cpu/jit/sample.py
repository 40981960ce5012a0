"""The kernel that samples tokens. What it computes is told by `ruvon.engine.sampler`, in numpy.

A unit of work is a *workspace*, which serves every so many rows one after the other: a row's
weights, V floats, stay in the cache of whoever works on it. All sums have one order, so a row's
token depends on that row alone.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types

from ruvon.kernels.cpu.arguments import Sample, SampledRow, SampledToken
from ruvon.kernels.cpu.jit import simd as v
from ruvon.kernels.cpu.jit.largest import (
    cut_of_largest,
    drop_ties,
    find_cut,
    first_in_row,
    largest,
    list_largest,
    where_at_least,
)
from ruvon.kernels.cpu.jit.llvm import F64, I64, Builder, number
from ruvon.kernels.cpu.jit.simd import operation
from ruvon.kernels.cpu.jit.translate import helper
from ruvon.kernels.cpu.params import TILE, Param

ROW_BYTES, RESULT_BYTES = 8 * len(SampledRow._fields), 8 * len(SampledToken._fields)
RANK, NORM = map(SampledToken._fields.index, ("rank", "norm"))  # behind the token


# Scores


@helper
def is_edited(row):
    """Whether scores differ from logits, or will be marked by top_k."""
    edits = row.num_biased + row.num_seen + row.num_counted + row.top_k
    return edits > 0 or row.num_allowed >= 0


@helper
def copy_allowed(row, x, width, ids, out):
    """The scores of those allowed. Returns where the ids that follow begin."""
    allowed = row.num_allowed
    for at in range(0, width, 16):
        v.store(out + 4 * at, -np.inf if allowed >= 0 else v.load(x + 4 * at))
    for n in range(allowed):
        token = v.read_i32(ids + 4 * n)
        v.write_f32(out + 4 * token, v.read_f32(x + 4 * token))
    return ids + 4 * max(allowed, 0)


@helper
def add_amounts(ids, amounts, count, x):
    for n in range(count):
        at = x + 4 * v.read_i32(ids + 4 * n)
        v.write_f32(at, v.read_f32(at) + v.read_f32(amounts + 4 * n))


@helper
def penalize_seen(ids, count, penalty, width, x, marks):
    """Make tokens less likely, whatever the sign of their score; once each."""
    for at in range((width + 7) // 8):
        v.write_i8(marks + at, 0)
    for n in range(count):
        token = v.read_i32(ids + 4 * n)
        mark, bit = v.read_i8(marks + token // 8), 1 << token % 8
        if mark & bit == 0:
            v.write_i8(marks + token // 8, mark | bit)
            score = v.read_f32(x + 4 * token)
            v.write_f32(x + 4 * token, score / penalty if score > 0 else score * penalty)


@helper
def edit(row, x, width, out, scratch):
    """Write a row's scores after all that the request bans, adds and penalizes."""
    ids, amounts = row.ids, row.amounts
    ids = copy_allowed(row, x, width, ids, out)
    biased, seen = row.num_biased, row.num_seen
    add_amounts(ids, amounts, biased, out)
    ids += 4 * biased
    if seen > 0:
        penalty = np.float32(row.repetition)
        penalize_seen(ids, seen, penalty, width, out, scratch)
    add_amounts(ids + 4 * seen, amounts + 4 * biased, row.num_counted, out)


# Weights, and a token by them


def wide_product(b: Builder, x: ir.Value, factor: int) -> tuple[ir.Value, ir.Value]:
    """The upper and lower 64 bits of an unsigned product."""
    wide = ir.IntType(128)
    product = b.mul(b.zext(x, wide), ir.Constant(wide, factor))
    return b.trunc(b.lshr(product, ir.Constant(wide, 64)), I64), b.trunc(product, I64)


def emit_uniform(b: Builder, seed: ir.Value, position: ir.Value) -> ir.Value:
    words = [b.add(position, number(1)), number(0), number(0), number(0)]
    keys = [seed, number(0)]
    for _ in range(10):
        high, low = wide_product(b, words[0], 0xD2E7470EE14C6C93)
        other_high, other_low = wide_product(b, words[2], 0xCA5A826395121157)
        words = [
            b.xor(b.xor(other_high, words[1]), keys[0]),
            other_low,
            b.xor(b.xor(high, words[3]), keys[1]),
            low,
        ]
        steps = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
        keys = [b.add(key, number(by)) for key, by in zip(keys, steps, strict=True)]
    bits = b.lshr(words[0], number(16))
    return b.fmul(b.uitofp(bits, F64), ir.Constant(F64, 2.0**-48))


# A number in [0, 1) out of Philox4x64-10 by seed and position, as `ruvon.engine.sampler` draws it:
# numpy counts one on before it draws
uniform = operation(emit_uniform, types.intp, types.intp, result=types.float64)


@helper
def weigh(row, x, width, best, out, scratch):
    """What remains to draw from after temperature, top_k and min_p: weights, 1 for the best."""
    cut, top_k = np.float32(-np.inf), row.top_k
    if 0 < top_k < width:  # then x is a copy, see `is_edited`
        cut, ties = cut_of_largest(x, width, top_k, scratch)
        drop_ties(x, width, cut, ties, -np.inf)
    for at in range(0, width, 16):
        score = v.load(x + 4 * at)
        weight = v.exp16((score - best) / row.temperature)
        weight = where_at_least(weight, row.min_p, weight, 0.0)
        weight = where_at_least(score, cut, weight, 0.0)
        v.store(out + 4 * at, v.keep_first(weight, width - at, 0.0))


@helper
def sum_of_tile(x, tile, least):
    """Of a tile's weights that reach ``least``."""
    at, sums = x + 4 * TILE * tile, 0.0
    for c in range(0, 4 * TILE, 64):
        weight = v.load(at + c)
        sums = sums + where_at_least(weight, least, weight, 0.0)
    return np.float64(v.sum_lanes(sums))


@helper
def sum_of(x, tiles, least):
    total = 0.0
    for tile in range(tiles):
        total += sum_of_tile(x, tile, least)
    return total


@helper
def keep_nucleus(x, width, tiles, top_p, scratch):
    """Zero all weights but the fewest, heaviest first, that add up to ``top_p`` of their sum.

    The lightest of them is sought where it must be: between two rungs of a ladder.
    """
    low, high, above = np.float32(0.125), np.float32(np.inf), 0.0
    goal = top_p * sum_of(x, tiles, 0.0)
    mass = sum_of(x, tiles, low)
    while mass < goal:  # ends when the rung is 0, if not before
        high, above = low, mass
        low = np.float32(low * np.float32(0.125))
        mass = sum_of(x, tiles, low)
    cut, left = find_cut(x, width, low, high, goal - above, True, scratch)
    for at in range(0, width, 16):
        weight = v.load(x + 4 * at)
        v.store(x + 4 * at, where_at_least(weight, cut, weight, 0.0))
    drop_ties(x, width, cut, max(math.ceil(left / np.float64(cut)), 1), 0.0)


@helper
def invert(x, tiles, share):
    """The token at which the running sum of weights passes ``share`` of their total: first among
    tiles, then inside one."""
    target, before, tile = share * sum_of(x, tiles, 0.0), 0.0, 0
    while tile < tiles - 1 and before + sum_of_tile(x, tile, 0.0) <= target:
        before += sum_of_tile(x, tile, 0.0)
        tile += 1
    first, inside = tile * TILE, 0.0
    for at in range(first, first + TILE):
        inside += np.float64(v.read_f32(x + 4 * at))
    # The tile's sum was rounded to float32, so what is left is a share of it, kept below all of it.
    rest = min((target - before) / sum_of_tile(x, tile, 0.0), 1 - 2.0**-48) * inside
    at, passed = first, np.float64(v.read_f32(x + 4 * first))
    while passed <= rest:
        at += 1
        passed += np.float64(v.read_f32(x + 4 * at))
    return at


@helper
def sample_one(row, width, work, scratch):
    """A token and the best score; -1 where that is no number. ``work``: float32 [tiles * TILE],
    zeros from V on."""
    x = row.logits
    best = largest(x, width)
    if math.isfinite(best) and is_edited(row):
        edit(row, x, width, work, scratch)
        x, best = work, largest(work, width)
    if not math.isfinite(best):
        return -1, best
    if row.temperature == 0:
        return first_in_row(x, width, best), best
    tiles, top_p = (width + TILE - 1) // TILE, row.top_p
    weigh(row, x, width, best, work, scratch)
    if top_p != 1:
        keep_nucleus(work, width, tiles, top_p, scratch)
    return invert(work, tiles, uniform(row.seed, row.position)), best


# Logprobs


@helper
def log_norm(x, width):
    """The logarithm of the sum of exponentials."""
    best, total = largest(x, width), 0.0
    for start in range(0, width, TILE):
        sums = 0.0
        for at in range(start, min(start + TILE, width), 16):
            sums = sums + v.exp16(v.keep_first(v.load(x + 4 * at), width - at, -np.inf) - best)
        total += np.float64(v.sum_lanes(sums))
    return np.float64(best) + math.log(total)


@helper
def count_above(x, width, value):
    counts = 0.0
    for at in range(0, width, 16):
        numbers = v.keep_first(v.load(x + 4 * at), width - at, -np.inf)
        counts = counts + where_at_least(value, numbers, 0.0, 1.0)
    return int(v.sum_lanes(counts))


@helper
def score(row, width, token, result, scratch):
    """How likely the model found a token, and which it found likeliest."""
    x, top = row.logits, row.num_top
    v.write_i64(result + 8 * RANK, count_above(x, width, v.read_f32(x + 4 * token)) + 1)
    v.write_f64(result + 8 * NORM, log_norm(x, width))
    if top > 0:
        list_largest(x, width, top, row.top, scratch)


def sample(address, params, start, stop, scratch):
    """Sample all rows."""
    a = v.arguments(Sample, address)
    rows, spaces = v.get(params, Param.LOGIT_ROWS), v.get(params, Param.SEQUENCES)
    space_bytes = (a.vocab_size + TILE - 1) // TILE * TILE * 4
    for space in range(start, stop):
        work = a.spaces + space * space_bytes
        for n in range(space, rows, spaces):
            row = v.arguments(SampledRow, a.rows + n * ROW_BYTES)
            result = a.results + n * RESULT_BYTES
            token, best = sample_one(row, a.vocab_size, work, scratch)
            v.write_i64(result, token)
            if token < 0:
                v.write_f64(result + 8 * NORM, best)
            elif row.num_top >= 0:
                score(row, a.vocab_size, token, result, scratch)
