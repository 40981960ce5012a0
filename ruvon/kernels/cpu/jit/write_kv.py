"""Queries, keys and values of new tokens: normed, rotated, and put where attention reads them."""

from __future__ import annotations

import numpy as np

from ruvon.kernels.cpu.arguments import WriteKV
from ruvon.kernels.cpu.formats import LANES, TileFormat
from ruvon.kernels.cpu.isa import Isa
from ruvon.kernels.cpu.jit import simd as v
from ruvon.kernels.cpu.jit.simd import make_scatter, make_store
from ruvon.kernels.cpu.jit.translate import helper


@helper
def round_lanes(count):
    return (count + 15) // 16 * 16


@helper
def normalize_head(head, dim, weight, eps):
    """RMS norm of one head in place; lanes behind its end stay zero."""
    squares = 0.0
    for c in range(0, dim, 16):
        value = v.load(head + 4 * c)
        squares = v.fma(value, value, squares)
    by = np.float32(1.0 / np.sqrt(v.sum_lanes(squares) / np.float32(dim) + eps))
    for c in range(0, dim, 16):
        value = v.load(head + 4 * c) * by * v.load(weight + 4 * c)
        v.store(head + 4 * c, v.keep_first(value, dim - c, 0.0))


@helper
def rotate_head(head, pairs, cos, sin):
    """Rotate dims (i, i + pairs) in place."""
    high = head + 4 * pairs
    if pairs % 16 == 0:
        for c in range(0, 4 * pairs, 64):
            a, b, x, y = v.load(head + c), v.load(high + c), v.load(cos + c), v.load(sin + c)
            v.store(head + c, a * x - b * y)
            v.store(high + c, b * x + a * y)
        return
    for c in range(0, 4 * pairs, 4):
        a, b = v.read_f32(head + c), v.read_f32(high + c)
        x, y = v.read_f32(cos + c), v.read_f32(sin + c)
        v.write_f32(head + c, np.float32(a * x) - np.float32(b * y))
        v.write_f32(high + c, np.float32(b * x) + np.float32(a * y))


@helper
def prepare_head(a, source, position, norm, head):
    """Copy one head to ``head``, norm and rotate it there."""
    dim = a.cache.head_dim
    for c in range(0, dim, 16):
        v.store(head + 4 * c, v.keep_first(v.load(source + 4 * c), dim - c, 0.0))
    if norm != 0:
        normalize_head(head, dim, norm, a.eps)
    if a.pairs != 0:
        at = position * 4 * a.pairs
        rotate_head(head, a.pairs, a.cos + at, a.sin + at)


@helper
def write_queries(a, token, group, position, head):
    """The query heads of one token that share a key/value head, one after another."""
    dim, share = a.cache.head_dim, a.cache.heads // a.cache.kv_heads
    row, out, padded = v.row_at(a.qkv, token), v.row_at(a.out, token), round_lanes(dim)
    for h in range(group * share, (group + 1) * share):
        prepare_head(a, row + 4 * h * dim, position, a.q_norm, head)
        for c in range(0, dim, 16):
            v.store(out + 4 * (h * padded + c), v.load(head + 4 * c))


def make_write_kv(cache: TileFormat, isa: Isa):
    """The kernel that splits q | k | v, norms and rotates q and k, and fills the cache.

    A unit is one token's query heads and key/value head of one group.
    """
    size = cache.step_bytes // LANES
    store_lanes, scatter_lanes = make_store(cache.storage), make_scatter(cache.storage, 16 * size)

    @helper
    def write_cache(cached, slot, group, head, value):
        """A key that was prepared, and its value, into their place in the cache."""
        dim, page = cached.head_dim, cached.page
        padded, at = round_lanes(dim), slot % page
        place = (slot // page * cached.kv_heads + group) * page * padded
        keys = cached.keys + size * (place + at // 16 * 16 * padded + at % 16)
        values = cached.values + size * (place + 16 * at)
        for c in range(0, dim, 16):
            scatter_lanes(keys + size * 16 * c, v.load(head + 4 * c))
            of_value = v.keep_first(v.load(value + 4 * c), dim - c, 0.0)
            store_lanes(values + size * page * c, of_value)

    def write_kv(address, params, start, stop, scratch):
        a, head = v.arguments(WriteKV, address), scratch
        groups, dim = a.cache.kv_heads, a.cache.head_dim
        for unit in range(start, stop):
            token, group = unit // groups, unit % groups
            position, slot = v.read_i32(a.positions + 4 * token), v.read_i32(a.slots + 4 * token)
            write_queries(a, token, group, position, head)
            key = v.row_at(a.qkv, token) + 4 * (a.cache.heads + group) * dim
            prepare_head(a, key, position, a.k_norm, head)
            write_cache(a.cache, slot, group, head, key + 4 * groups * dim)

    return write_kv
