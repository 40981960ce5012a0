"""Attention of sequences with one query in this step, over the paged cache.

Bound by reading keys and values: all query heads of a group share one read, and few sequences with
long contexts are split over several programs, of which the last to come merges. It can take over
`write_kv` (``fused``), since its programs meet the new token's key and value anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.kv import load_heads
from ruvon.kernels.ops import AttentionSpec, ForwardBatch, Rope
from ruvon.kernels.paged import LOG2_E, finish, finite, key_rows
from ruvon.kernels.pdl import prefetch, release, wait

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
def prefetch_pages(
    k_cache_ptr, v_cache_ptr, table_ptr, first, last, group, G,
    PAGE: tl.constexpr, D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Ask for the pages that hold keys ``first .. last`` of a group; the first 64 of them."""
    pages = first // PAGE + tl.arange(0, 64)
    wanted = pages * PAGE < last
    block = tl.load(table_ptr + pages, mask=wanted, other=0).to(tl.int64)
    start = (block * G + group) * PAGE * D
    num_bytes = PAGE * D * (k_cache_ptr.dtype.element_ty.primitive_bitwidth // 8)
    nothing = start * 0
    k_at = (k_cache_ptr + start).to(tl.int64)
    prefetch(tl.where(wanted, k_at, nothing), num_bytes, PDL)
    v_at = (v_cache_ptr + start).to(tl.int64)
    prefetch(tl.where(wanted, v_at, nothing), num_bytes, PDL)


@triton.jit(do_not_specialize=["S", "table_stride"])  # one variant for all shapes of tables
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
    ASK: tl.constexpr,  # whether to ask for keys before the wait
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
        if ASK & (queries == 1) & (split < active):
            prefetch_pages(
                k_cache_ptr, v_cache_ptr, table, begin, end, group, G, PAGE, D, PDL
            )  # fmt: skip
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


class DecodeTile(NamedTuple):
    keys: int
    warps: int
    stages: int
    ask: bool = True


def decode_tile(share: int, block_d: int, programs: int) -> DecodeTile:
    """As measured on an H100. More keys or stages need more registers, and then fewer programs
    share a multiprocessor. Programs that all start at once ask for their keys before they wait; of
    more, each would ask for what it is about to read anyway, which costs a tenth."""
    few = programs <= PROGRAMS
    if share > 1 and few and block_d <= 64:
        return DecodeTile(128, 4, 2)
    if share == 1 and programs > 6 * PROGRAMS and block_d <= 64:
        return DecodeTile(32, 4, 3, ask=False)
    return DecodeTile(64 if block_d <= 128 else 32, 4, 2, ask=few)


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
    tile = tile or decode_tile(share, block_d, sequences * groups * splits)
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
        ASK=tile.ask,
        PDL=pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
