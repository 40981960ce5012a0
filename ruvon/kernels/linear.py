"""Matrix products: few rows stream the weights, many rows go to cuBLAS.

With up to `GEMV_ROWS` rows a product is bound by reading its weight once. `_gemv_kernel` gives each
program a few weight rows, loads them whole into registers *before* it waits for the kernel in front
of it (see `ruvon.kernels.pdl`), and can apply the residual addition and the norm in front of the
product itself, so that a layer is five launches. With up to `SKINNY_ROWS` rows `_skinny_kernel`
uses tensor cores, asks for its weights before it waits, and splits long sums over programs; so do
logits of any number of rows, in float32. Both finish with bias and activation. Large weights and 33
to 64 rows go to `ruvon.kernels.tma_linear`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.activation import KINDS, activate, apply_activation
from ruvon.kernels.norm import add_norm
from ruvon.kernels.ops import GATED, Activation, Packed
from ruvon.kernels.pdl import prefetch, release, wait
from ruvon.kernels.split_k import Workspace, plan_split_k, reduce_split_k
from ruvon.kernels.tma_linear import tma_linear, tma_tile

GEMV_ROWS = 2
GEMV_COLUMNS = 8192  # a weight row longer than this does not fit the registers
SKINNY_ROWS = 64


@triton.jit
def _gemv_kernel(
    x_ptr,
    residual_ptr,
    total_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    N,
    K,
    x_stride,
    eps,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,  # 0 none, 1 RMS, 2 layer
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    used, inside = outputs < N, columns < K
    at = weight_ptr + outputs.to(tl.int64)[:, None] * K + columns[None, :]
    mask = used[:, None] & inside[None, :]
    weight = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
    up = weight
    if GATED:
        offset = tl.cast(N, tl.int64) * K
        up = tl.load(at + offset, mask=mask, other=0.0, eviction_policy="evict_first")
    bias = tl.zeros([BLOCK_N], tl.float32)
    up_bias = bias
    if HAS_BIAS:
        bias = tl.load(bias_ptr + outputs, mask=used, other=0.0).to(tl.float32)
        if GATED:
            up_bias = tl.load(bias_ptr + N + outputs, mask=used, other=0.0).to(tl.float32)
    gain = tl.zeros([BLOCK_K], tl.float32)
    shift = gain
    if NORM > 0:
        gain = tl.load(norm_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM == 2:
        shift = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            x = x + tl.load(residual_ptr + row * K + columns, mask=inside, other=0.0)
            if tl.program_id(0) == 0:
                tl.store(total_ptr + row * K + columns, x, mask=inside)
        wide = x.to(tl.float32)
        if NORM > 0:  # both sums at once: every round through the whole program counts here
            square = tl.sum(wide * wide, axis=0) / K
            if NORM == 2:
                mean = tl.sum(wide, axis=0) / K
                scale = tl.rsqrt(tl.maximum(square - mean * mean, 0.0) + eps)
                wide = (wide - mean) * scale * gain + shift
            else:
                wide = wide * tl.rsqrt(square + eps) * gain
            wide = wide.to(x.dtype).to(tl.float32)
        y = activate(tl.sum(weight.to(tl.float32) * wide[None, :], axis=1) + bias, ACTIVATION)
        if GATED:
            y *= tl.sum(up.to(tl.float32) * wide[None, :], axis=1) + up_bias
        tl.store(out_ptr + row * N + outputs, y.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit(do_not_specialize=["M"])  # one variant for all numbers of rows
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    counters_ptr,
    partial_ptr,
    M,
    N,
    x_stride,
    K: tl.constexpr,
    PER_SPLIT: tl.constexpr,  # columns of one program, a multiple of BLOCK_K
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,  # then BLOCK_N counts both halves' outputs once, and sums are not split
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile, split = tl.program_id(0), tl.program_id(1)
    outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    used = outputs < N
    first = split * PER_SPLIT
    last = tl.minimum(first + PER_SPLIT, K)
    offset = tl.cast(N, tl.int64) * K
    weight_at = weight_ptr + tl.minimum(outputs, N - 1).to(tl.int64) * K
    num_bytes = (last - first) * (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    prefetch(weight_at + first, num_bytes, PREFETCH)
    if GATED:
        prefetch(weight_at + offset + first, num_bytes, PREFETCH)
    wait(PDL)
    x_at = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ups = sums
    for k in tl.range(first, last, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = (columns < last)[None, :]
        x = tl.load(x_at + columns[None, :], mask=(rows < M)[:, None] & inside, other=0.0)
        weight = tl.load(weight_at[:, None] + columns[None, :], mask=inside, other=0.0)
        sums = tl.dot(x, weight.T, sums, input_precision="ieee")
        if GATED:
            up = tl.load(weight_at[:, None] + offset + columns[None, :], mask=inside, other=0.0)
            ups = tl.dot(x, up.T, ups, input_precision="ieee")
    sums, finishing = reduce_split_k(
        sums, tile, split, counters_ptr, partial_ptr, SPLIT_K, BLOCK_M, BLOCK_N
    )
    if finishing:
        if HAS_BIAS:
            sums += tl.load(bias_ptr + outputs, mask=used, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up_bias = tl.load(bias_ptr + N + outputs, mask=used, other=0.0)
                ups += up_bias.to(tl.float32)[None, :]
        y = activate(sums, ACTIVATION)
        if GATED:
            y *= ups
        out_at = out_ptr + rows.to(tl.int64)[:, None] * N + outputs[None, :]
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & used[None, :])


class Norm(NamedTuple):
    """The normalisation in front of a product: RMS without a bias, layer norm with one."""

    weight_C: Tensor
    bias_C: Tensor | None
    eps: float


class GemvTile(NamedTuple):
    outputs: int
    columns: int
    warps: int


def gemv_tile(k: int, gated: bool, normed: bool) -> GemvTile:
    """As measured on an H100: few weights a thread, so that many programs fit; but more where a
    norm has to be repeated by each of them."""
    columns = triton.next_power_of_2(k)
    warps = 4 if columns <= 1024 else 8
    per_thread = 64 if normed else 32
    outputs = max(1, warps * 32 * per_thread // columns // (2 if gated else 1))
    return GemvTile(outputs, columns, warps)


def gemv(
    x_TK: Tensor,
    residual_TK: Tensor | None,
    norm: Norm | None,
    weight: Packed,
    bias_N: Tensor | None,
    activation: Activation,
    out_dtype: torch.dtype,
    pdl: bool,
    tile: GemvTile | None = None,
) -> tuple[Tensor, Tensor]:
    """(act(norm(x + residual) Wᵀ + b), x + residual) for at most `GEMV_ROWS` rows."""
    rows, k = x_TK.shape
    gated = activation in GATED
    n = weight.shape[0] // (2 if gated else 1)
    tile = tile or gemv_tile(k, gated, norm is not None)
    out_TN = torch.empty(rows, n, dtype=out_dtype, device=x_TK.device)
    total_TK = x_TK if residual_TK is None else torch.empty_like(x_TK)
    _gemv_kernel[(triton.cdiv(n, tile.outputs),)](
        x_TK,
        residual_TK,
        total_TK,
        norm.weight_C if norm else None,
        norm.bias_C if norm else None,
        weight.tensors[0],
        bias_N,
        out_TN,
        n,
        k,
        x_TK.stride(0),
        norm.eps if norm else 0.0,
        ROWS=rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.columns,
        NORM=0 if norm is None else 1 if norm.bias_C is None else 2,
        HAS_RESIDUAL=residual_TK is not None,
        HAS_BIAS=bias_N is not None,
        ACTIVATION=KINDS[activation],
        GATED=gated,
        PDL=pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
    return out_TN, total_TK


class SkinnyTile(NamedTuple):
    rows: int
    outputs: int
    columns: int
    split_k: int
    stages: int
    warps: int = 4


def skinny_tile(m: int, n: int, k: int, gated: bool) -> SkinnyTile:
    """As measured on an H100 (docs/log.md)."""
    if m > 64:
        return batch_invariant_tile(m, gated)
    few = m <= 16
    rows = 16 if few else 64  # the matrix unit takes 64, and is slower with 32
    if n > 16384:
        return SkinnyTile(rows, 32, 256, 1, 4) if few else batch_invariant_tile(m, gated)
    if gated:
        return SkinnyTile(rows, 32, 64, 1, 4) if few else batch_invariant_tile(m, gated)
    if k > 1024 and n <= 1024:
        return SkinnyTile(rows, 32, 128, min(6, k // 256), 4)
    return SkinnyTile(rows, 32, 256 if few and n > 1024 else 128, 1, 4)


def batch_invariant_tile(m: int, gated: bool) -> SkinnyTile:
    """Tiles of one kind of matrix instruction, which adds up a row's products in one order: so a
    row comes out the same to the last bit among however many others."""
    if m <= 64:
        return SkinnyTile(64, 16 if gated else 32, 128, 1, 4)
    return SkinnyTile(128, 64 if gated else 128, 64, 1, 3 if gated else 4, 8)


def skinny_is_faster(n: int, k: int) -> bool:
    """Whether `skinny` beats cuBLAS, which needs no launch in between but cannot overlap any.

    On an H100 it does for weights of up to some 6 MB, and for heads: for them cuBLAS has no good
    kernel that writes float32.
    """
    return n * k <= 3 << 20 or n > 16384


def skinny(
    x_TK: Tensor,
    weight: Packed,
    bias_N: Tensor | None,
    activation: Activation,
    out_dtype: torch.dtype,
    workspace: Workspace,
    pdl: bool,
    tile: SkinnyTile | None = None,
) -> Tensor:
    """act(x Wᵀ + b) on tensor cores."""
    rows, k = x_TK.shape
    gated = activation in GATED
    n = weight.shape[0] // (2 if gated else 1)
    tile = tile or skinny_tile(rows, n, k, gated)
    columns = min(tile.columns, max(16, triton.next_power_of_2(k)))
    tiles, split_k, per_split = plan_split_k(n, k, tile.outputs, columns, tile.split_k)
    out_TN = torch.empty(rows, n, dtype=out_dtype, device=x_TK.device)
    _skinny_kernel[(tiles, split_k, triton.cdiv(rows, tile.rows))](
        x_TK,
        weight.tensors[0],
        bias_N,
        out_TN,
        workspace.counters,
        workspace.partial,
        rows,
        n,
        x_TK.stride(0),
        K=k,
        PER_SPLIT=per_split,
        SPLIT_K=split_k,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=columns,
        HAS_BIAS=bias_N is not None,
        ACTIVATION=KINDS[activation],
        GATED=gated,
        PREFETCH=pdl and k * weight.tensors[0].element_size() % 16 == 0,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=pdl,
    )
    return out_TN


def linear(
    x_TK: Tensor,
    weight: Packed,
    bias_N: Tensor | None,
    activation: Activation,
    workspace: Workspace,
    pdl: bool = False,
) -> Tensor:
    rows, k = x_TK.shape
    if rows <= GEMV_ROWS and k <= GEMV_COLUMNS:
        return gemv(x_TK, None, None, weight, bias_N, activation, x_TK.dtype, pdl)[0]
    if rows <= SKINNY_ROWS and skinny_is_faster(*weight.shape):
        return skinny(x_TK, weight, bias_N, activation, x_TK.dtype, workspace, pdl)
    tile = tma_tile(rows, *weight.shape, activation in GATED)
    if tile is not None and x_TK.is_contiguous() and x_TK.dtype != torch.float32:
        return tma_linear(x_TK, weight, bias_N, activation, workspace, pdl, tile)
    dense_NK = weight.tensors[0]
    if activation == "gelu_tanh" and bias_N is not None and x_TK.is_cuda:
        return torch._addmm_activation(bias_N, x_TK, dense_NK.T, use_gelu=True)  # cuBLAS's is tanh
    return apply_activation(F.linear(x_TK, dense_NK, bias_N), activation, pdl)


def batch_invariant_linear(
    x_TK: Tensor,
    weight: Packed,
    bias_N: Tensor | None,
    activation: Activation,
    workspace: Workspace,
    pdl: bool = False,
) -> Tensor:
    """`linear`, with the same bits for a row whatever the others are, and how many."""
    tile = batch_invariant_tile(x_TK.shape[0], activation in GATED)
    return skinny(x_TK, weight, bias_N, activation, x_TK.dtype, workspace, pdl, tile)


def norm_linear(
    x_TK: Tensor,
    residual_TK: Tensor | None,
    norm_weight_K: Tensor,
    norm_bias_K: Tensor | None,
    eps: float,
    weight: Packed,
    bias_N: Tensor | None,
    activation: Activation,
    workspace: Workspace,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """(act(norm(x + residual) Wᵀ + b), x + residual): one launch for few rows, else two."""
    rows, k = x_TK.shape
    if rows <= GEMV_ROWS and k <= GEMV_COLUMNS:
        norm = Norm(norm_weight_K, norm_bias_K, eps)
        return gemv(x_TK, residual_TK, norm, weight, bias_N, activation, x_TK.dtype, pdl)
    normed_TK, total_TK = add_norm(x_TK, residual_TK, norm_weight_K, norm_bias_K, eps, pdl)
    return linear(normed_TK, weight, bias_N, activation, workspace, pdl), total_TK


def logits(x_LC: Tensor, head: Packed, workspace: Workspace, pdl: bool = False) -> Tensor:
    """float32 out of the accumulators: rounding to bfloat16 first would make ties."""
    rows, k = x_LC.shape
    if rows <= GEMV_ROWS and k <= GEMV_COLUMNS:
        return gemv(x_LC, None, None, head, None, "none", torch.float32, pdl)[0]
    return skinny(x_LC, head, None, "none", torch.float32, workspace, pdl)


def batch_invariant_logits(
    x_LC: Tensor, head: Packed, workspace: Workspace, pdl: bool = False
) -> Tensor:
    """`logits`, as `batch_invariant_linear` is `linear`."""
    tile = batch_invariant_tile(x_LC.shape[0], gated=False)
    return skinny(x_LC, head, None, "none", torch.float32, workspace, pdl, tile)
