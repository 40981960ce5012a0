"""Queries, keys and values of new tokens: normed, rotated, and put where attention reads them."""

from __future__ import annotations

import numpy as np

from ruvon.kernels.cpu.arguments import WriteKV
from ruvon.kernels.cpu.formats import LANES, TileFormat
from ruvon.kernels.cpu.isa import Isa
from ruvon.kernels.cpu.jit.simd import (
    arguments,
    fma,
    keep_first,
    load,
    make_scatter,
    make_store,
    read_f32,
    read_i32,
    row_at,
    store,
    sum_lanes,
    write_f32,
)
from ruvon.kernels.cpu.jit.translate import helper


@helper
def round_lanes(count):
    return (count + 15) // 16 * 16


@helper
def normalize_head(head, dim, weight, eps):
    """RMS norm of one head in place; lanes behind its end stay zero."""
    squares = 0.0
    for c in range(0, dim, 16):
        value = load(head + 4 * c)
        squares = fma(value, value, squares)
    by = np.float32(1.0 / np.sqrt(sum_lanes(squares) / np.float32(dim) + eps))
    for c in range(0, dim, 16):
        value = load(head + 4 * c) * by * load(weight + 4 * c)
        store(head + 4 * c, keep_first(value, dim - c, 0.0))


@helper
def rotate_head(head, pairs, cos, sin):
    """Rotate dims (i, i + pairs) in place."""
    high = head + 4 * pairs
    if pairs % 16 == 0:
        for c in range(0, 4 * pairs, 64):
            a, b, x, y = load(head + c), load(high + c), load(cos + c), load(sin + c)
            store(head + c, a * x - b * y)
            store(high + c, b * x + a * y)
        return
    for c in range(0, 4 * pairs, 4):
        a, b = read_f32(head + c), read_f32(high + c)
        x, y = read_f32(cos + c), read_f32(sin + c)
        write_f32(head + c, np.float32(a * x) - np.float32(b * y))
        write_f32(high + c, np.float32(b * x) + np.float32(a * y))


@helper
def prepare_head(a, source, position, norm, head):
    """Copy one head to ``head``, norm and rotate it there."""
    dim = a.cache.head_dim
    for c in range(0, dim, 16):
        store(head + 4 * c, keep_first(load(source + 4 * c), dim - c, 0.0))
    if norm != 0:
        normalize_head(head, dim, norm, a.eps)
    if a.pairs != 0:
        at = position * 4 * a.pairs
        rotate_head(head, a.pairs, a.cos + at, a.sin + at)


@helper
def write_queries(a, token, group, position, head):
    """The query heads of one token that share a key/value head, one after another."""
    dim, share = a.cache.head_dim, a.cache.heads // a.cache.kv_heads
    row, out, padded = row_at(a.qkv, token), row_at(a.out, token), round_lanes(dim)
    for h in range(group * share, (group + 1) * share):
        prepare_head(a, row + 4 * h * dim, position, a.q_norm, head)
        for c in range(0, dim, 16):
            store(out + 4 * (h * padded + c), load(head + 4 * c))


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
            scatter_lanes(keys + size * 16 * c, load(head + 4 * c))
            of_value = keep_first(load(value + 4 * c), dim - c, 0.0)
            store_lanes(values + size * page * c, of_value)

    def write_kv(address, params, start, stop, scratch):
        a, head = arguments(WriteKV, address), scratch
        groups, dim = a.cache.kv_heads, a.cache.head_dim
        for unit in range(start, stop):
            token, group = unit // groups, unit % groups
            position, slot = read_i32(a.positions + 4 * token), read_i32(a.slots + 4 * token)
            write_queries(a, token, group, position, head)
            key = row_at(a.qkv, token) + 4 * (a.cache.heads + group) * dim
            prepare_head(a, key, position, a.k_norm, head)
            write_cache(a.cache, slot, group, head, key + 4 * groups * dim)

    return write_kv
