"""What both attention kernels share: finding keys in the paged cache, and an online softmax.

The softmax is in base 2 and float32. A sink enters once, when a row is finished.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.pdl import prefetch

LOG2_E = tl.constexpr(1.4426950408889634)


class Caches(NamedTuple):
    """One layer's keys and values, [B, G, P, D] each."""

    k: Tensor
    v: Tensor


class Softmax(NamedTuple):
    """Of rows (heads, or queries) over the keys seen so far; only in kernels."""

    top: Tensor  # the largest score
    weight: Tensor  # sum of 2 ** (score - top)
    total: Tensor  # [rows, BLOCK_D], sum of values times the same


@triton.jit
def cache_row(block, place, group, G, PAGE: tl.constexpr, D: tl.constexpr):
    """Where the key of a token is in its cache, and its value in the other."""
    return ((block * G + group) * PAGE + place) * D


@triton.jit
def prefetch_pages(
    caches, table_ptr, first, last, group, G,
    PAGE: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Ask for the pages that hold keys ``first .. last`` of a group; the first 64 of them."""
    pages = first // PAGE + tl.arange(0, 64)
    wanted = pages * PAGE < last
    block = tl.load(table_ptr + pages, mask=wanted, other=0).to(tl.int64)
    start = cache_row(block, 0, group, G, PAGE, D)
    num_bytes = PAGE * D * (caches.k.dtype.element_ty.primitive_bitwidth // 8)
    nothing = start * 0
    prefetch(tl.where(wanted, (caches.k + start).to(tl.int64), nothing), num_bytes, PDL)
    prefetch(tl.where(wanted, (caches.v + start).to(tl.int64), nothing), num_bytes, PDL)


@triton.jit
def load_kv(
    caches, table_ptr, keys, inside, group, G,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A group's keys and values ``[keys, BLOCK_D]``, zeros for keys that are not ``inside``."""
    block = tl.load(table_ptr + keys // PAGE, mask=inside, other=0).to(tl.int64)
    rows = cache_row(block, keys % PAGE, group, G, PAGE, D)
    dims = tl.arange(0, BLOCK_D)
    at = rows[:, None] + dims[None, :]
    mask = inside[:, None] & (dims < D)[None, :]
    return (
        tl.load(caches.k + at, mask=mask, other=0.0),
        tl.load(caches.v + at, mask=mask, other=0.0),
    )


@triton.jit
def finite(maximum):
    """A base for exponents: rows that have seen no key yet have a maximum of minus infinity."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def no_keys(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The softmax before any key."""
    return Softmax(
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.zeros([ROWS, BLOCK_D], tl.float32),
    )


@triton.jit
def one_key(score, value):
    """The softmax of each row over one key."""
    return Softmax(score, tl.full(score.shape, 1.0, tl.float32), value.to(tl.float32))


@triton.jit
def merge(one, other):
    """The softmax over the keys of both."""
    top = tl.maximum(one.top, other.top)
    base = finite(top)
    keep, add = tl.exp2(one.top - base), tl.exp2(other.top - base)
    weight = one.weight * keep + other.weight * add
    return Softmax(top, weight, one.total * keep[:, None] + other.total * add[:, None])


@triton.jit
def finish(softmax, sinks_ptr, heads, used):
    """The weighted mean of values; a sink takes its share and gives nothing."""
    weight, total = softmax.weight, softmax.total
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + heads, mask=used, other=0.0).to(tl.float32) * LOG2_E
        top = tl.maximum(softmax.top, sink)
        keep = tl.exp2(softmax.top - top)
        weight = weight * keep + tl.exp2(sink - top)
        total = total * keep[:, None]
    return total / tl.where(weight > 0.0, weight, 1.0)[:, None]
