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

from ruvon.kernels.kv import Norms, load_angles, load_heads, make_angles
from ruvon.kernels.ops import AttentionSpec, ForwardBatch, Rope
from ruvon.kernels.paged import (
    LOG2_E,
    Caches,
    Softmax,
    cache_row,
    finish,
    finite,
    load_kv,
    merge,
    no_keys,
    one_key,
    prefetch_pages,
)
from ruvon.kernels.pdl import release, wait

PROGRAMS = 264  # two for each multiprocessor of an H100
SHORTEST_SPLIT = tl.constexpr(256)  # keys; merging costs about as much as reading these


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
    useful = triton.cdiv(max_context, SHORTEST_SPLIT.value)
    wanted = min(PROGRAMS // (sequences * groups), useful, 32)
    return 1 << max(0, int(wanted).bit_length() - 1)


class StepIndex(NamedTuple):
    """What the kernel reads of a `ForwardBatch`, for one cache group."""

    tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    positions: Tensor
    slots: Tensor


class Shape(NamedTuple):
    """Of one layer's attention, and of the blocks that hold it."""

    GROUP: int  # query heads that share a key head
    D: int
    PAGE: int
    WINDOW: int
    ROTATED: int  # dims that turn; 0 for no rotation
    BLOCK_H: int
    BLOCK_D: int


class DecodeTile(NamedTuple):
    keys: int
    warps: int
    stages: int
    ask: bool = True


@triton.jit
def split_keys(
    context, split, SPLITS: tl.constexpr, FUSED: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(first, end of the keys of a split, how many splits have any): of those in the cache, so
    without the new token's if ``FUSED``."""
    last = context - 1 if FUSED else context
    first = tl.maximum(context - WINDOW, 0) if WINDOW > 0 else 0
    length = tl.maximum(last - first, 1)
    per_split = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    per_split = tl.maximum(per_split, SHORTEST_SPLIT)
    begin = first + split * per_split
    return begin, tl.minimum(begin + per_split, last), tl.cdiv(length, per_split)


@triton.jit
def load_query(row, heads, used, angles, norms, SHAPE: tl.constexpr, FUSED: tl.constexpr):
    """A token's query heads ``[BLOCK_H, BLOCK_D]`` in float32; normed and rotated if ``FUSED``."""
    if FUSED:
        q = load_heads(
            row, heads, used, norms.q, norms.eps, angles, SHAPE.D, SHAPE.ROTATED, SHAPE.BLOCK_D
        ).to(row.dtype.element_ty)  # fmt: skip
    else:
        dims = tl.arange(0, SHAPE.BLOCK_D)
        at = row + heads[:, None] * SHAPE.D + dims[None, :]
        q = tl.load(at, mask=used[:, None] & (dims < SHAPE.D)[None, :], other=0.0)
    return q.to(tl.float32)


@triton.jit
def attend_head(
    q, caches, table_ptr, first, last, group, G, scale, SHAPE: tl.constexpr, TILE: tl.constexpr
):
    """The softmax of one query head ``q [1, BLOCK_D]`` over keys ``first .. last``.

    Every lane of the key tile keeps a softmax of its own, merged at the end, so the loop has no
    reduction but the dot product itself.
    """
    lanes = no_keys(TILE.keys, SHAPE.BLOCK_D)
    for start in tl.range(first, last, TILE.keys, num_stages=TILE.stages):
        keys = start + tl.arange(0, TILE.keys)
        k, v = load_kv(
            caches, table_ptr, keys, keys < last, group, G, SHAPE.D, SHAPE.PAGE, SHAPE.BLOCK_D
        )
        score = tl.sum(k.to(tl.float32) * q, axis=1) * scale
        lanes = merge(lanes, one_key(tl.where(keys < last, score, float("-inf")), v))
    top = tl.max(lanes.top, axis=0, keep_dims=True)
    share = tl.exp2(lanes.top - finite(top))
    weight = tl.sum(lanes.weight * share, axis=0, keep_dims=True)
    return Softmax(top, weight, tl.sum(lanes.total * share[:, None], axis=0, keep_dims=True))


@triton.jit
def attend_group(
    q, caches, table_ptr, first, last, group, G, scale, SHAPE: tl.constexpr, TILE: tl.constexpr
):
    """That of all query heads of a group, ``q [BLOCK_H, BLOCK_D]``, on tensor cores."""
    top, weight, total = no_keys(SHAPE.BLOCK_H, SHAPE.BLOCK_D)
    for start in tl.range(first, last, TILE.keys, num_stages=TILE.stages):
        keys = start + tl.arange(0, TILE.keys)
        k, v = load_kv(
            caches, table_ptr, keys, keys < last, group, G, SHAPE.D, SHAPE.PAGE, SHAPE.BLOCK_D
        )
        scores = tl.dot(q.to(k.dtype), k.T, input_precision="ieee") * scale
        scores = tl.where((keys < last)[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        base = finite(new)
        p, keep = tl.exp2(scores - base[:, None]), tl.exp2(top - base)
        weight = weight * keep + tl.sum(p, axis=1)
        total = tl.dot(p.to(v.dtype), v, total * keep[:, None], input_precision="ieee")
        top = new
    return Softmax(top, weight, total)


@triton.jit
def load_new_kv(row, caches, group, H, G, angles, norms, SHAPE: tl.constexpr):
    """The new token's key and value of a group, ``[1, BLOCK_D]``, as the cache will hold them."""
    dims = tl.arange(0, SHAPE.BLOCK_D)
    head = tl.zeros([1], tl.int32) + group
    k = load_heads(
        row + H * SHAPE.D, head, head >= 0, norms.k, norms.eps, angles,
        SHAPE.D, SHAPE.ROTATED, SHAPE.BLOCK_D,
    )  # fmt: skip
    v_at = row + (H + G + head[:, None]) * SHAPE.D + dims[None, :]
    v = tl.load(v_at, mask=(dims < SHAPE.D)[None, :], other=0.0)
    return k.to(caches.k.dtype.element_ty), v.to(caches.v.dtype.element_ty)


@triton.jit
def store_new_kv(k, v, caches, slot, group, G, SHAPE: tl.constexpr):
    slot = slot.to(tl.int64)
    dims = tl.arange(0, SHAPE.BLOCK_D)[None, :]
    block, place = slot // SHAPE.PAGE, slot % SHAPE.PAGE
    at = cache_row(block, place, group, G, SHAPE.PAGE, SHAPE.D) + dims
    tl.store(caches.k + at, k, mask=dims < SHAPE.D)
    tl.store(caches.v + at, v, mask=dims < SHAPE.D)


@triton.jit
def part_places(partial_ptr, s, split, heads, S, H, SPLITS: tl.constexpr, SHAPE: tl.constexpr):
    """Where a split leaves its softmax for the others."""
    tops_ptr = partial_ptr + S * SPLITS * H * SHAPE.D
    row = (s * SPLITS + split) * H + heads
    total_at = partial_ptr + row[:, None] * SHAPE.D + tl.arange(0, SHAPE.BLOCK_D)[None, :]
    return Softmax(tops_ptr + row, tops_ptr + S * SPLITS * H + row, total_at)


@triton.jit
def store_part(at, part, used, inside):
    tl.store(at.total, part.total, mask=inside)
    tl.store(at.top, part.top, mask=used)
    tl.store(at.weight, part.weight, mask=used)


@triton.jit
def load_part(at, used, inside):
    return Softmax(
        tl.load(at.top, mask=used, other=float("-inf"), cache_modifier=".cg"),
        tl.load(at.weight, mask=used, other=0.0, cache_modifier=".cg"),
        tl.load(at.total, mask=inside, other=0.0, cache_modifier=".cg"),
    )


@triton.jit
def comes_last(counter_ptr, programs):
    """Whether the other programs have left their parts; then the counter is zero again."""
    tl.debug_barrier()  # every thread's part is written before one thread says so
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit(do_not_specialize=["S", "table_stride"])  # one variant for all shapes of tables
def _decode_kernel(
    q_ptr,  # q of [T, H, D], or if FUSED the whole qkv
    caches,  # Caches
    index,  # StepIndex
    rope,  # Angles
    norms,  # Norms
    sinks_ptr,
    out_ptr,
    workspace,  # Workspace
    scale,
    q_stride,
    table_stride,
    S,
    G,
    SHAPE: tl.constexpr,  # Shape
    TILE: tl.constexpr,  # DecodeTile
    SPLITS: tl.constexpr,
    FUSED: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    group, split, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    H = G * SHAPE.GROUP
    if not FUSED:
        wait(PDL)
    # If FUSED, everything up to the wait is older than this step's model: see ruvon.kernels.pdl.
    # Behind it every trip to memory is waited for, so what can be looked up is looked up here.
    token = tl.load(index.query_starts + s).to(tl.int64)
    queries = tl.load(index.query_starts + s + 1) - token
    present = tl.where(queries == 1, token, 0)  # padding's may be no token's place
    angles = load_angles(rope, index.positions + present, SHAPE.ROTATED, SHAPE.BLOCK_D)
    slot = tl.load(index.slots + present)
    context = tl.load(index.context_lens + s)
    first, last, active = split_keys(context, split, SPLITS, FUSED, SHAPE.WINDOW, TILE.keys)
    table = index.tables + s.to(tl.int64) * table_stride
    if FUSED:
        if TILE.ask & (queries == 1) & (split < active):
            prefetch_pages(caches, table, first, last, group, G, SHAPE.PAGE, SHAPE.D, PDL)
        wait(PDL)
    if (queries == 1) & (split < active):
        members = tl.arange(0, SHAPE.BLOCK_H)
        heads, used = group * SHAPE.GROUP + members, members < SHAPE.GROUP
        dims = tl.arange(0, SHAPE.BLOCK_D)
        inside = used[:, None] & (dims < SHAPE.D)[None, :]
        row = q_ptr + token * q_stride
        if FUSED:
            k, v = load_new_kv(row, caches, group, H, G, angles, norms, SHAPE)
        q = load_query(row, heads, used, angles, norms, SHAPE, FUSED)
        if SHAPE.GROUP == 1:
            part = attend_head(q, caches, table, first, last, group, G, scale, SHAPE, TILE)
        else:
            part = attend_group(q, caches, table, first, last, group, G, scale, SHAPE, TILE)
        if FUSED:  # noqa: SIM102, only the inner one is decided when running
            if split == active - 1:
                store_new_kv(k, v, caches, slot, group, G, SHAPE)
                part = merge(part, one_key(tl.sum(q * k.to(tl.float32), axis=1) * scale, v))
        out_at = out_ptr + (token * H + heads[:, None]) * SHAPE.D + dims[None, :]
        if (SPLITS == 1) | (active == 1):
            y = finish(part, sinks_ptr, heads, used)
            tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            mine = part_places(workspace.partial, s, split, heads, S, H, SPLITS, SHAPE)
            store_part(mine, part, used, inside)
            if comes_last(workspace.counters + s * G + group, active):
                whole = no_keys(SHAPE.BLOCK_H, SHAPE.BLOCK_D)
                for other in tl.range(0, active):
                    its = part_places(workspace.partial, s, other, heads, S, H, SPLITS, SHAPE)
                    whole = merge(whole, load_part(its, used, inside))
                y = finish(whole, sinks_ptr, heads, used)
                tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=inside)


def decode_tile(share: int, block_d: int, programs: int) -> DecodeTile:
    """As measured on an H100. More keys or stages need more registers, and so do fewer warps, but
    these have less to add up between them: of many programs that multiply, a warp each with few
    keys is fastest, of fewer two. Programs that all start at once ask for their keys before they
    wait; of more, each would ask for what it is about to read anyway, which costs a tenth."""
    few, narrow, many = programs <= PROGRAMS, block_d <= 64, programs / PROGRAMS
    if share > 1 and few and narrow:
        return DecodeTile(128, 4, 2)
    if share > 1 and narrow and many > 3:
        return DecodeTile(16, 1, 3, ask=False)
    if share > 1 and block_d <= 128 and many > (2.5 if narrow else 1):
        return DecodeTile(64, 2, 2, ask=False)
    if share == 1 and narrow and many > 8:
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
    share, paged = spec.num_heads // groups, batch.paged[spec.cache_group]
    context = min(batch.max_context, spec.window or batch.max_context)
    splits = num_splits(sequences, groups, context)
    block_d = triton.next_power_of_2(spec.head_dim)
    tile = tile or decode_tile(share, block_d, sequences * groups * splits)
    _decode_kernel[(groups, splits, sequences)](
        q,
        Caches(k_cache_BGPD, v_cache_BGPD),
        StepIndex(
            paged.block_tables, batch.query_starts, batch.context_lens, batch.positions, paged.slots
        ),
        make_angles(rope),
        Norms(*(norms or (None, None, 0.0))),
        sinks_H,
        out_TE,
        workspace,
        spec.scale * LOG2_E.value,
        q.stride(0),
        paged.block_tables.stride(0),
        sequences,
        groups,
        SHAPE=Shape(
            GROUP=share,
            D=spec.head_dim,
            PAGE=k_cache_BGPD.shape[2],
            WINDOW=spec.window,
            ROTATED=2 * rope.cos_PD.shape[1] if rope else 0,
            BLOCK_H=1 if share == 1 else max(16, triton.next_power_of_2(share)),
            BLOCK_D=block_d,
        ),
        TILE=tile,
        SPLITS=splits,
        FUSED=fused,
        PDL=pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
