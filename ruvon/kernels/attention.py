"""Attention over the paged cache, for ragged batches.

Two kernels share the work by how many queries a sequence has in this step. `_decode_kernel` takes
sequences with one: it is bound by reading keys and values, so all query heads of a group share one
read, and few sequences with long contexts are split over several programs. `_prefill_kernel` takes
the others, in tiles of queries. A decode-only step launches the first alone; it can then also take
over `write_kv` (see `attend`), since its programs meet the new token's key and value anyway.

Softmax runs online in base 2 and float32. A sink enters once, when a row is finished.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.kv import load_heads, write_kv
from ruvon.kernels.ops import AttentionSpec, ForwardBatch, Rope
from ruvon.kernels.pdl import prefetch, release, wait

LOG2_E = tl.constexpr(1.4426950408889634)
PROGRAMS = 264  # two for each multiprocessor of an H100
SHORTEST_SPLIT = 256  # keys; merging costs about as much as reading these


class Workspace(NamedTuple):
    """Where splits of one sequence leave their part. The counters are zero between launches."""

    counters: Tensor  # int32 [sequences * groups]
    partial: Tensor  # float32: [S, splits, H, D] sums, then [S, splits, H] maxima, then weights


def make_workspace(device: torch.device) -> Workspace:
    """Enough for any split that `num_splits` chooses."""
    return Workspace(
        torch.zeros(PROGRAMS, dtype=torch.int32, device=device),
        torch.empty(2 * PROGRAMS * 16 * (256 + 2), dtype=torch.float32, device=device),
    )


def num_splits(sequences: int, groups: int, max_context: int) -> int:
    """Programs for one sequence and group: a power of two, so that few variants are compiled."""
    wanted = min(PROGRAMS // (sequences * groups), triton.cdiv(max_context, SHORTEST_SPLIT), 32)
    return 1 << max(0, int(wanted).bit_length() - 1)


@triton.jit
def key_rows(table_ptr, keys, inside, group, G, PAGE: tl.constexpr, D: tl.constexpr):
    """Offsets of these keys' rows in either cache."""
    page = tl.load(table_ptr + keys // PAGE, mask=inside, other=0).to(tl.int64)
    return ((page * G + group) * PAGE + keys % PAGE) * D


@triton.jit
def finite(maximum):
    """A base for exponents: rows that have seen no key yet have a maximum of minus infinity."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def stream_head(
    q, k_cache_ptr, v_cache_ptr, table_ptr, first, last, group, G, scale,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One query head ``q [1, BLOCK_D]`` over keys ``first .. last``: (maximum, weight, sum).

    Every lane of the key tile keeps a softmax of its own, merged at the end, so the loop has no
    reduction but the dot product itself.
    """
    dims = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_N)
    top_N = tl.full([BLOCK_N], float("-inf"), tl.float32)
    weight_N = tl.zeros([BLOCK_N], tl.float32)
    sum_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        keys = start + lanes
        inside = keys < last
        at = key_rows(table_ptr, keys, inside, group, G, PAGE, D)[:, None] + dims[None, :]
        mask = inside[:, None] & (dims < D)[None, :]
        k = tl.load(k_cache_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_cache_ptr + at, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(inside, tl.sum(k * q, axis=1) * scale, float("-inf"))
        new_N = tl.maximum(top_N, score)
        base_N = finite(new_N)
        p_N, keep_N = tl.exp2(score - base_N), tl.exp2(top_N - base_N)
        weight_N = weight_N * keep_N + p_N
        sum_ND = sum_ND * keep_N[:, None] + p_N[:, None] * v
        top_N = new_N
    top = tl.max(top_N, axis=0)
    share_N = tl.exp2(top_N - finite(top))
    weight = tl.sum(weight_N * share_N, axis=0)
    sum_D = tl.sum(sum_ND * share_N[:, None], axis=0)
    ones = tl.full([1], 1.0, tl.float32)
    return tl.where(ones > 0, top, 0.0), ones * weight, sum_D[None, :]


@triton.jit
def stream_group(
    q, k_cache_ptr, v_cache_ptr, table_ptr, first, last, group, G, scale,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All query heads of a group, ``q [BLOCK_H, BLOCK_D]``, on tensor cores."""
    dims = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_N)
    top_H = tl.full([BLOCK_H], float("-inf"), tl.float32)
    weight_H = tl.zeros([BLOCK_H], tl.float32)
    sum_HD = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        keys = start + lanes
        inside = keys < last
        at = key_rows(table_ptr, keys, inside, group, G, PAGE, D)[:, None] + dims[None, :]
        mask = inside[:, None] & (dims < D)[None, :]
        k = tl.load(k_cache_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_cache_ptr + at, mask=mask, other=0.0)
        scores = tl.dot(q.to(k.dtype), k.T, input_precision="ieee") * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        new_H = tl.maximum(top_H, tl.max(scores, axis=1))
        base_H = finite(new_H)
        p = tl.exp2(scores - base_H[:, None])
        keep_H = tl.exp2(top_H - base_H)
        weight_H = weight_H * keep_H + tl.sum(p, axis=1)
        sum_HD = tl.dot(p.to(v.dtype), v, sum_HD * keep_H[:, None], input_precision="ieee")
        top_H = new_H
    return top_H, weight_H, sum_HD


@triton.jit
def finish(top_H, weight_H, sum_HD, sinks_ptr, heads, used, HAS_SINKS: tl.constexpr):
    """The softmax-weighted mean; a sink takes its share and gives nothing."""
    if HAS_SINKS:
        sink_H = tl.load(sinks_ptr + heads, mask=used, other=0.0).to(tl.float32) * LOG2_E
        new_H = tl.maximum(top_H, sink_H)
        keep_H = tl.exp2(top_H - new_H)
        weight_H = weight_H * keep_H + tl.exp2(sink_H - new_H)
        sum_HD = sum_HD * keep_H[:, None]
    return sum_HD / tl.where(weight_H > 0.0, weight_H, 1.0)[:, None]


@triton.jit
def _decode_kernel(
    q_ptr,  # q of [T, H, D], or if FUSED the whole qkv
    k_cache_ptr,
    v_cache_ptr,
    tables_ptr,
    query_starts_ptr,
    context_lens_ptr,
    positions_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    sinks_ptr,
    out_ptr,
    counters_ptr,
    partial_ptr,
    scale,
    eps,
    q_stride,
    table_stride,
    angle_stride,
    S,
    G,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    SHORTEST: tl.constexpr,
    FUSED: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    group, split, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    H = G * GROUP
    dims = tl.arange(0, BLOCK_D)
    members = tl.arange(0, BLOCK_H)
    used = members < GROUP
    heads = group * GROUP + members
    inside = used[:, None] & (dims < D)[None, :]
    if not FUSED:
        wait(PDL)
    # If FUSED, everything up to the wait is older than this step's model: see ruvon.kernels.pdl.
    token = tl.load(query_starts_ptr + s).to(tl.int64)
    queries = tl.load(query_starts_ptr + s + 1) - token
    context = tl.load(context_lens_ptr + s)
    last = context - 1 if FUSED else context
    first = tl.maximum(context - WINDOW, 0) if WINDOW > 0 else 0
    length = tl.maximum(last - first, 1)
    per_split = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N, SHORTEST)
    active = tl.cdiv(length, per_split)
    begin = first + split * per_split
    end = tl.minimum(begin + per_split, last)
    table = tables_ptr + s.to(tl.int64) * table_stride
    if FUSED:
        if (queries == 1) & (split < active):
            pages = begin // PAGE + tl.arange(0, 64)
            wanted = pages * PAGE < end
            block = tl.load(table + pages, mask=wanted, other=0).to(tl.int64)
            start = (block * G + group) * PAGE * D
            num_bytes = PAGE * D * (k_cache_ptr.dtype.element_ty.primitive_bitwidth // 8)
            nothing = start * 0
            k_at = (k_cache_ptr + start).to(tl.int64)
            prefetch(tl.where(wanted, k_at, nothing), num_bytes, PDL)
            v_at = (v_cache_ptr + start).to(tl.int64)
            prefetch(tl.where(wanted, v_at, nothing), num_bytes, PDL)
        wait(PDL)
    if (queries == 1) & (split < active):
        row = q_ptr + token * q_stride
        cos, sin = row, row
        if ROTATED > 0:
            position = tl.load(positions_ptr + token).to(tl.int64)
            cos, sin = cos_ptr + position * angle_stride, sin_ptr + position * angle_stride
        if FUSED:
            q = load_heads(row, heads, used, q_norm_ptr, cos, sin, eps, D, ROTATED, NORMED, BLOCK_D)
            q = q.to(q_ptr.dtype.element_ty).to(tl.float32)
        else:
            at = row + heads[:, None] * D + dims[None, :]
            q = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if GROUP == 1:
            top, weight, total = stream_head(
                q, k_cache_ptr, v_cache_ptr, table, begin, end, group, G, scale,
                D, PAGE, BLOCK_N, BLOCK_D, STAGES,
            )  # fmt: skip
        else:
            top, weight, total = stream_group(
                q, k_cache_ptr, v_cache_ptr, table, begin, end, group, G, scale,
                D, PAGE, BLOCK_N, BLOCK_D, BLOCK_H, STAGES,
            )  # fmt: skip
        if FUSED:  # noqa: SIM102, only the inner one is decided when running
            if split == active - 1:
                one = tl.zeros([1], tl.int32) + group
                k = load_heads(
                    row + H * D, one, one >= 0, k_norm_ptr, cos, sin, eps,
                    D, ROTATED, NORMED, BLOCK_D,
                )  # fmt: skip
                v_at = row + (H + G + one[:, None]) * D + dims[None, :]
                v = tl.load(v_at, mask=(dims < D)[None, :], other=0.0)
                slot = tl.load(slots_ptr + token).to(tl.int64)
                page = (slot // PAGE) * G + group
                cell = (page * PAGE + slot % PAGE) * D + dims[None, :]
                k = k.to(k_cache_ptr.dtype.element_ty)
                tl.store(k_cache_ptr + cell, k, mask=(dims < D)[None, :])
                v_narrow = v.to(v_cache_ptr.dtype.element_ty)
                tl.store(v_cache_ptr + cell, v_narrow, mask=(dims < D)[None, :])
                score = tl.sum(q * k.to(tl.float32), axis=1) * scale
                new = tl.maximum(top, score)
                keep, p = tl.exp2(top - new), tl.exp2(score - new)
                weight = weight * keep + p
                total = total * keep[:, None] + p[:, None] * v_narrow.to(tl.float32)
                top = new
        out_at = out_ptr + (token * H + heads[:, None]) * D + dims[None, :]
        if (SPLITS == 1) | (active == 1):
            y = finish(top, weight, total, sinks_ptr, heads, used, HAS_SINKS)
            tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            tops_ptr = partial_ptr + S * SPLITS * H * D
            weights_ptr = tops_ptr + S * SPLITS * H
            mine = (s * SPLITS + split) * H + heads
            tl.store(partial_ptr + mine[:, None] * D + dims[None, :], total, mask=inside)
            tl.store(tops_ptr + mine, top, mask=used)
            tl.store(weights_ptr + mine, weight, mask=used)
            tl.debug_barrier()  # every thread's part is written before one thread says so
            counter = counters_ptr + s * G + group
            if tl.atomic_add(counter, 1, sem="acq_rel") == active - 1:
                tl.store(counter, 0)
                top = tl.full([BLOCK_H], float("-inf"), tl.float32)
                weight = tl.zeros([BLOCK_H], tl.float32)
                total = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
                for other in tl.range(0, active):
                    its = (s * SPLITS + other) * H + heads
                    its_top = tl.load(
                        tops_ptr + its, mask=used, other=float("-inf"), cache_modifier=".cg"
                    )
                    its_weight = tl.load(
                        weights_ptr + its, mask=used, other=0.0, cache_modifier=".cg"
                    )
                    its_total = tl.load(
                        partial_ptr + its[:, None] * D + dims[None, :],
                        mask=inside, other=0.0, cache_modifier=".cg",
                    )  # fmt: skip
                    new = tl.maximum(top, its_top)
                    base = finite(new)
                    keep, add = tl.exp2(top - base), tl.exp2(its_top - base)
                    weight = weight * keep + its_weight * add
                    total = total * keep[:, None] + its_total * add[:, None]
                    top = new
                y = finish(top, weight, total, sinks_ptr, heads, used, HAS_SINKS)
                tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def attend_tile(
    q, top_M, weight_M, sum_MD, k_cache_ptr, v_cache_ptr, table_ptr, first, last, positions_M,
    group, G, scale, D: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of queries over keys ``first .. last``; unless ``MASKED`` all see all of them."""
    dims = tl.arange(0, BLOCK_D)
    for start in tl.range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = keys < last
        at = key_rows(table_ptr, keys, inside, group, G, PAGE, D)[:, None] + dims[None, :]
        mask = inside[:, None] & (dims < D)[None, :]
        k = tl.load(k_cache_ptr + at, mask=mask, other=0.0)
        v = tl.load(v_cache_ptr + at, mask=mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale
        if MASKED:
            seen = (keys[None, :] <= positions_M[:, None]) & inside[None, :]
            if WINDOW > 0:
                seen &= keys[None, :] > positions_M[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        new_M = tl.maximum(top_M, tl.max(scores, axis=1))
        base_M = finite(new_M)
        p = tl.exp2(scores - base_M[:, None])
        keep_M = tl.exp2(top_M - base_M)
        weight_M = weight_M * keep_M + tl.sum(p, axis=1)
        sum_MD = tl.dot(p.to(v.dtype), v, sum_MD * keep_M[:, None], input_precision="ieee")
        top_M = new_M
    return top_M, weight_M, sum_MD


@triton.jit
def _prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
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
    HAS_SINKS: tl.constexpr,
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
        q = q.to(k_cache_ptr.dtype.element_ty)
        positions_M = context - queries + query
        first_position = context - queries + first_query
        last = tl.minimum(first_position + BLOCK_Q, context)
        table = tables_ptr + s.to(tl.int64) * table_stride
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        weight = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if WINDOW > 0:
            clear = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        else:
            clear = (first_position + 1) // BLOCK_N * BLOCK_N
            top, weight, total = attend_tile(
                q, top, weight, total, k_cache_ptr, v_cache_ptr, table, 0, clear, positions_M,
                group, G, scale, D, PAGE, WINDOW, False, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        top, weight, total = attend_tile(
            q, top, weight, total, k_cache_ptr, v_cache_ptr, table, clear, last, positions_M,
            group, G, scale, D, PAGE, WINDOW, True, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        y = finish(top, weight, total, sinks_ptr, heads, used, HAS_SINKS)
        out_at = out_ptr + ((token + query).to(tl.int64) * H + heads)[:, None] * D + dims[None, :]
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=inside)


def attention(
    q_THD: Tensor,
    k_cache_BGPD: Tensor,
    v_cache_BGPD: Tensor,
    batch: ForwardBatch,
    spec: AttentionSpec,
    sinks_H: Tensor | None,
    workspace: Workspace,
    pdl: bool = False,
    steady: bool = False,
) -> Tensor:
    """As the reference. Rows of padding (sequences with no queries) are left as they are.

    Where ``steady``, the prefill kernel takes all sequences: then neither how many there are nor
    how a prompt is cut into chunks changes a bit.
    """
    out_TE = q_THD.new_empty(q_THD.shape[0], spec.num_heads * spec.head_dim)
    caches = k_cache_BGPD, v_cache_BGPD
    if steady:
        launch_prefill(q_THD, *caches, batch, spec, sinks_H, out_TE, pdl, fewest=1)
        return out_TE
    if batch.max_query > 1:
        launch_prefill(q_THD, *caches, batch, spec, sinks_H, out_TE, pdl, fewest=2)
    launch_decode(q_THD, *caches, batch, spec, sinks_H, out_TE, workspace, pdl)
    return out_TE


def attend(
    qkv_TE: Tensor,
    batch: ForwardBatch,
    k_cache_BGPD: Tensor,
    v_cache_BGPD: Tensor,
    spec: AttentionSpec,
    rope: Rope | None,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    sinks_H: Tensor | None,
    workspace: Workspace,
    pdl: bool = False,
) -> Tensor:
    """`write_kv` and `attention`, in one launch where every sequence has one query."""
    if batch.max_query > 1:
        q_THD = write_kv(
            qkv_TE, batch, k_cache_BGPD, v_cache_BGPD, spec, rope, q_norm_D, k_norm_D, eps, pdl
        )
        return attention(q_THD, k_cache_BGPD, v_cache_BGPD, batch, spec, sinks_H, workspace, pdl)
    out_TE = qkv_TE.new_empty(qkv_TE.shape[0], spec.num_heads * spec.head_dim)
    launch_decode(
        qkv_TE, k_cache_BGPD, v_cache_BGPD, batch, spec, sinks_H, out_TE, workspace, pdl,
        fused=True, rope=rope, norms=None if q_norm_D is None else (q_norm_D, k_norm_D, eps),
    )  # fmt: skip
    return out_TE


class DecodeTile(NamedTuple):
    keys: int
    warps: int
    stages: int


def decode_tile(share: int, block_d: int, many: bool) -> DecodeTile:
    """On an H100 two stages of 64 keys were best or within 5 % for 1 to 256 sequences: more need
    more registers, and then fewer programs share a multiprocessor."""
    if share > 1 and not many and block_d <= 64:
        return DecodeTile(128, 4, 2)
    return DecodeTile(64 if block_d <= 128 else 32, 4, 2)


def launch_decode(
    q: Tensor,
    k_cache_BGPD: Tensor,
    v_cache_BGPD: Tensor,
    batch: ForwardBatch,
    spec: AttentionSpec,
    sinks_H: Tensor | None,
    out_TE: Tensor,
    workspace: Workspace,
    pdl: bool,
    *,
    fused: bool = False,
    rope: Rope | None = None,
    norms: tuple[Tensor, Tensor | None, float] | None = None,
    tile: DecodeTile | None = None,
) -> None:
    sequences, groups = batch.context_lens.shape[0], spec.num_kv_heads
    share = spec.num_heads // groups
    context = min(batch.max_context, spec.window or batch.max_context)
    splits = num_splits(sequences, groups, context)
    block_d = triton.next_power_of_2(spec.head_dim)
    many = sequences * groups * splits > PROGRAMS
    tile = tile or decode_tile(share, block_d, many)
    q_norm_D, k_norm_D, eps = norms or (None, None, 0.0)
    _decode_kernel[(groups, splits, sequences)](
        q,
        k_cache_BGPD,
        v_cache_BGPD,
        batch.block_tables,
        batch.query_starts,
        batch.context_lens,
        batch.positions,
        batch.slots,
        rope.cos_PD if rope else None,
        rope.sin_PD if rope else None,
        q_norm_D,
        k_norm_D,
        sinks_H,
        out_TE,
        workspace.counters,
        workspace.partial,
        spec.scale * LOG2_E.value,
        eps,
        q.stride(0),
        batch.block_tables.stride(0),
        rope.cos_PD.stride(0) if rope else 0,
        sequences,
        groups,
        GROUP=share,
        D=spec.head_dim,
        PAGE=k_cache_BGPD.shape[2],
        WINDOW=spec.window,
        SPLITS=splits,
        SHORTEST=SHORTEST_SPLIT,
        FUSED=fused,
        ROTATED=2 * rope.cos_PD.shape[1] if rope else 0,
        NORMED=norms is not None,
        HAS_SINKS=sinks_H is not None,
        BLOCK_H=1 if share == 1 else max(16, triton.next_power_of_2(share)),
        BLOCK_N=tile.keys,
        BLOCK_D=block_d,
        STAGES=tile.stages,
        PDL=pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )


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
    share = spec.num_heads // groups
    block_d = triton.next_power_of_2(spec.head_dim)
    tile = tile or prefill_tile(block_d)
    block_m = max(tile.rows, triton.next_power_of_2(share))
    block_q = block_m // share
    tiles = q_THD.shape[0] // block_q + sequences
    _prefill_kernel[(tiles, groups)](
        q_THD,
        k_cache_BGPD,
        v_cache_BGPD,
        batch.block_tables,
        batch.query_starts,
        batch.context_lens,
        sinks_H,
        out_TE,
        spec.scale * LOG2_E.value,
        q_THD.stride(0),
        batch.block_tables.stride(0),
        sequences,
        groups,
        GROUP=share,
        D=spec.head_dim,
        PAGE=k_cache_BGPD.shape[2],
        WINDOW=spec.window,
        HAS_SINKS=sinks_H is not None,
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
