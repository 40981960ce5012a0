"""Queries, keys and values on their way: head norms, rotation, and the write to the paged cache."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.ops import AttentionSpec, ForwardBatch, Rope
from ruvon.kernels.paged import Caches, cache_row
from ruvon.kernels.pdl import release, wait


class Angles(NamedTuple):
    """The tables of a `Rope`; None where there are none."""

    cos: Tensor | None
    sin: Tensor | None
    stride: int


class Norms(NamedTuple):
    """Of query heads and of key heads; None where there are none."""

    q: Tensor | None
    k: Tensor | None
    eps: float


def make_angles(rope: Rope | None) -> Angles:
    return (
        Angles(rope.cos_PD, rope.sin_PD, rope.cos_PD.stride(0)) if rope else Angles(None, None, 0)
    )


@triton.jit
def load_angles(rope, position_ptr, ROTATED: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosines and sines of a token's position, ``[BLOCK_D]``: a dim turns to its cosine times
    itself and its sine times the dim half a rotation away."""
    cos, sin = tl.full([BLOCK_D], 1.0, tl.float32), tl.zeros([BLOCK_D], tl.float32)
    if ROTATED > 0:
        at = tl.load(position_ptr).to(tl.int64) * rope.stride
        dims = tl.arange(0, BLOCK_D)
        low, turns = dims < ROTATED // 2, dims < ROTATED
        angle = tl.where(low, dims, dims - ROTATED // 2)
        cos = tl.load(rope.cos + at + angle, mask=turns, other=1.0)
        sin = tl.load(rope.sin + at + angle, mask=turns, other=0.0)
        sin = tl.where(low, -sin, sin)
    return cos, sin


@triton.jit
def load_heads(
    row_ptr,
    heads,
    used,
    norm_ptr,
    eps,
    angles,
    D: tl.constexpr,
    ROTATED: tl.constexpr,  # dims that turn; 0 for no rotation
    BLOCK_D: tl.constexpr,
):
    """Heads ``[heads, BLOCK_D]`` of one token, normed and rotated, in float32.

    ``angles`` are of this token's position (`load_angles`). Each dim also loads its partner,
    half a rotation away, so nothing has to be moved between threads.
    """
    dims = tl.arange(0, BLOCK_D)
    inside = used[:, None] & (dims < D)[None, :]
    at = row_ptr + heads[:, None] * D
    raw = tl.load(at + dims[None, :], mask=inside, other=0.0)
    x = raw.to(tl.float32)
    scale = tl.full([1], 1.0, tl.float32)[:, None]
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None]
        gain = tl.load(norm_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)
        x = (x * scale * gain[None, :]).to(raw.dtype).to(tl.float32)
    if ROTATED > 0:
        HALF: tl.constexpr = ROTATED // 2
        turns = dims < ROTATED
        low = dims < HALF
        partner = tl.where(low, dims + HALF, dims - HALF)
        partner = tl.where(turns, partner, dims)
        other = tl.load(at + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            gain = tl.load(norm_ptr + partner, mask=dims < D, other=0.0).to(tl.float32)
            other = (other * scale * gain[None, :]).to(raw.dtype).to(tl.float32)
        x = x * angles[0][None, :] + other * angles[1][None, :]
    return x


@triton.jit
def _write_kernel(
    qkv_ptr,
    positions_ptr,
    slots_ptr,
    rope,  # Angles
    norms,  # Norms
    q_ptr,
    caches,  # Caches
    H,
    G,
    qkv_stride,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    ROTATED: tl.constexpr,
    WRITES_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program moves ``BLOCK_H`` heads of one kind (q, k or v) of one token."""
    release(PDL)
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    dims = tl.arange(0, BLOCK_D)
    q_tiles = tl.cdiv(H, BLOCK_H) * WRITES_Q
    kv_tiles = tl.cdiv(G, BLOCK_H)
    wait(PDL)
    row = qkv_ptr + token * qkv_stride
    angles = load_angles(rope, positions_ptr + token, ROTATED, BLOCK_D)
    if tile < q_tiles:
        heads = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        used = heads < H
        q = load_heads(row, heads, used, norms.q, norms.eps, angles, D, ROTATED, BLOCK_D)
        at = q_ptr + (token * H + heads[:, None]) * D + dims[None, :]
        inside = used[:, None] & (dims < D)[None, :]
        tl.store(at, q.to(q_ptr.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            tile -= q_tiles
            is_v = tile >= kv_tiles
            heads = (tile - tl.where(is_v, kv_tiles, 0)) * BLOCK_H + tl.arange(0, BLOCK_H)
            used = heads < G
            inside = used[:, None] & (dims < D)[None, :]
            at = cache_row(slot // PAGE, slot % PAGE, heads[:, None], G, PAGE, D) + dims[None, :]
            if is_v:
                source = row + (H + G + heads[:, None]) * D + dims[None, :]
                v = tl.load(source, mask=inside)
                tl.store(caches.v + at, v.to(caches.v.dtype.element_ty), mask=inside)
            else:
                k = load_heads(
                    row + H * D, heads, used, norms.k, norms.eps, angles, D, ROTATED, BLOCK_D
                )
                tl.store(caches.k + at, k.to(caches.k.dtype.element_ty), mask=inside)


def write_kv(
    qkv_TE: Tensor,
    batch: ForwardBatch,
    k_cache_BGPD: Tensor,
    v_cache_BGPD: Tensor,
    spec: AttentionSpec,
    rope: Rope | None,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    pdl: bool = False,
) -> Tensor:
    """As the reference; a token whose slot is negative is padding and is not written.

    Where queries pass unchanged, the result is a view into ``qkv_TE``.
    """
    assert (q_norm_D is None) == (k_norm_D is None)
    tokens = qkv_TE.shape[0]
    heads, groups, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    writes_q = rope is not None or q_norm_D is not None
    q_THD = qkv_TE.view(tokens, -1, dim)[:, :heads]
    if writes_q:
        q_THD = qkv_TE.new_empty(tokens, heads, dim)
    block_d = triton.next_power_of_2(dim)
    block_h = max(1, min(triton.next_power_of_2(max(heads, groups)), 2048 // block_d))
    tiles = triton.cdiv(heads, block_h) * writes_q + 2 * triton.cdiv(groups, block_h)
    _write_kernel[(tokens, tiles)](
        qkv_TE,
        batch.positions,
        batch.paged[spec.cache_group].slots,
        make_angles(rope),
        Norms(q_norm_D, k_norm_D, eps),
        q_THD,
        Caches(k_cache_BGPD, v_cache_BGPD),
        heads,
        groups,
        qkv_TE.stride(0),
        D=dim,
        PAGE=k_cache_BGPD.shape[2],
        ROTATED=2 * rope.cos_PD.shape[1] if rope else 0,
        WRITES_Q=writes_q,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        PDL=pdl,
        launch_pdl=pdl,
    )
    return q_THD
