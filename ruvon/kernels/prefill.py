"""Attention of sequences with several queries in this step, in tiles of queries."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.ops import AttentionSpec, ForwardBatch
from ruvon.kernels.paged import LOG2_E, Caches, Softmax, finish, finite, load_kv, no_keys
from ruvon.kernels.pdl import release, wait


@triton.jit
def attend_tile(
    q, softmax, caches, table_ptr, first, last, lowest, positions_M,
    group, G, scale, D: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of queries over keys ``first .. last``; unless ``MASKED`` all see all of them. None
    sees a key before ``lowest``: with a window, the block it was in may be another's by now.

    Maxima are of products before ``scale``. Where a prompt is cut decides which keys are masked, so
    both ways must round alike: what a compiler could fuse in one of them and not in the other is
    fused by name.
    """
    top_M, weight_M, sum_MD = softmax
    for start in tl.range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < last
        if WINDOW > 0:
            inside &= keys >= lowest
        k, v = load_kv(caches, table_ptr, keys, inside, group, G, D, PAGE, BLOCK_D)
        products = tl.dot(q, k.T, input_precision="ieee")
        if MASKED:
            seen = (keys[None, :] <= positions_M[:, None]) & (keys < last)[None, :]
            if WINDOW > 0:
                seen &= keys[None, :] > positions_M[:, None] - WINDOW
            products = tl.where(seen, products, float("-inf"))
        new_M = tl.maximum(top_M, tl.max(products, axis=1))
        base_M = finite(new_M)
        p = tl.exp2(tl.fma(products, scale, (base_M * -scale)[:, None]))
        keep_M = tl.exp2((top_M - base_M) * scale)
        weight_M = tl.fma(weight_M, keep_M, tl.sum(p, axis=1))
        sum_MD = tl.dot(p.to(v.dtype), v, sum_MD * keep_M[:, None], input_precision="ieee")
        top_M = new_M
    return Softmax(top_M, weight_M, sum_MD)


@triton.jit(do_not_specialize=["S", "table_stride"])  # one variant for all shapes of tables
def _prefill_kernel(
    q_ptr,
    caches,  # Caches
    tables_ptr,
    query_starts_ptr,
    context_lens_ptr,
    sinks_ptr,
    out_ptr,
    scale,
    q_stride,
    table_stride,
    S,
    G,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    FEWEST: tl.constexpr,  # queries of the sequences to take
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes ``BLOCK_Q`` queries of one sequence and all heads of one group.

    Sequence ``s`` owns the tiles from ``query_starts[s] // BLOCK_Q + s`` on: an upper bound of its
    needs, so that a program finds its work by bisection and the grid does not depend on the batch.
    """
    release(PDL)
    tile, group = tl.program_id(0), tl.program_id(1)
    H = G * GROUP
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    wait(PDL)
    low, high = tile * 0, S
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_starts_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle
    s = low
    token = tl.load(query_starts_ptr + s)
    queries = tl.load(query_starts_ptr + s + 1) - token
    context = tl.load(context_lens_ptr + s)
    first_query = (tile - token // BLOCK_Q - s) * BLOCK_Q
    if (queries >= FEWEST) & (first_query < queries):
        query = first_query + rows // GROUP
        heads = group * GROUP + rows % GROUP
        used = (rows < BLOCK_Q * GROUP) & (query < queries)
        inside = used[:, None] & (dims < D)[None, :]
        q_at = q_ptr + (token + query).to(tl.int64)[:, None] * q_stride + heads[:, None] * D
        q = tl.load(q_at + dims[None, :], mask=inside, other=0.0)
        q = q.to(caches.k.dtype.element_ty)
        positions_M = context - queries + query
        first_position = context - queries + first_query
        last = tl.minimum(first_position + BLOCK_Q, context)
        table = tables_ptr + s.to(tl.int64) * table_stride
        softmax = no_keys(BLOCK_M, BLOCK_D)
        lowest = first_position - WINDOW + 1 if WINDOW > 0 else 0
        if WINDOW > 0:
            clear = tl.maximum(lowest, 0) // BLOCK_N * BLOCK_N
        else:
            clear = (first_position + 1) // BLOCK_N * BLOCK_N
            softmax = attend_tile(
                q, softmax, caches, table, 0, clear, lowest, positions_M,
                group, G, scale, D, PAGE, WINDOW, False, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        softmax = attend_tile(
            q, softmax, caches, table, clear, last, lowest, positions_M,
            group, G, scale, D, PAGE, WINDOW, True, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        scaled = Softmax(softmax.top * scale, softmax.weight, softmax.total)
        y = finish(scaled, sinks_ptr, heads, used)
        out_at = out_ptr + ((token + query).to(tl.int64) * H + heads)[:, None] * D + dims[None, :]
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=inside)


class PrefillTile(NamedTuple):
    rows: int  # queries times the heads that share a key
    keys: int
    warps: int
    stages: int


def prefill_tile(block_d: int) -> PrefillTile:
    if block_d <= 64:
        return PrefillTile(128, 64, 8, 2)
    return PrefillTile(64, 64, 4 if block_d <= 128 else 8, 2)


def launch_prefill(
    q_THD: Tensor,
    k_cache_BGPD: Tensor,
    v_cache_BGPD: Tensor,
    batch: ForwardBatch,
    spec: AttentionSpec,
    sinks_H: Tensor | None,
    out_TE: Tensor,
    pdl: bool,
    fewest: int,
    tile: PrefillTile | None = None,
) -> None:
    """Takes the sequences with at least ``fewest`` queries."""
    sequences, groups = batch.context_lens.shape[0], spec.num_kv_heads
    share, paged = spec.num_heads // groups, batch.paged[spec.cache_group]
    block_d = triton.next_power_of_2(spec.head_dim)
    tile = tile or prefill_tile(block_d)
    block_m = max(tile.rows, triton.next_power_of_2(share))
    block_q = block_m // share
    tiles = q_THD.shape[0] // block_q + sequences
    _prefill_kernel[(tiles, groups)](
        q_THD,
        Caches(k_cache_BGPD, v_cache_BGPD),
        paged.block_tables,
        batch.query_starts,
        batch.context_lens,
        sinks_H,
        out_TE,
        spec.scale * LOG2_E.value,
        q_THD.stride(0),
        paged.block_tables.stride(0),
        sequences,
        groups,
        GROUP=share,
        D=spec.head_dim,
        PAGE=k_cache_BGPD.shape[2],
        WINDOW=spec.window,
        FEWEST=fewest,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_N=tile.keys,
        BLOCK_D=block_d,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=pdl,
    )
