"""Matrix products: few rows stream the weights, many rows go to cuBLAS.

With up to `GEMV_ROWS` rows a product is bound by reading its weight once. `_gemv_kernel` gives each
program a few weight rows, loads them whole into registers *before* it waits for the kernel in front
of it (see `ruvon.kernels.pdl`), and can apply the residual addition and the norm in front of the
product itself, so that a layer is five launches. With up to `SKINNY_ROWS` rows `_skinny_kernel`
does the same on tensor cores. Both finish with bias and activation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.activation import KINDS, activate, apply_activation
from ruvon.kernels.norm import add_norm, normalize
from ruvon.kernels.ops import Activation, Packed
from ruvon.kernels.pdl import prefetch, release, wait

GEMV_ROWS = 8
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
        if NORM > 0:
            normed = normalize(x, gain, shift, inside, K, eps, NORM == 2)
            wide = normed.to(x.dtype).to(tl.float32)
        y = activate(tl.sum(weight.to(tl.float32) * wide[None, :], axis=1) + bias, ACTIVATION)
        if GATED:
            y *= tl.sum(up.to(tl.float32) * wide[None, :], axis=1) + up_bias
        tl.store(out_ptr + row * N + outputs, y.to(out_ptr.dtype.element_ty), mask=used)


@triton.jit
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    rows = tl.arange(0, BLOCK_M)
    first = tl.program_id(0) * BLOCK_N
    outputs = first + tl.arange(0, BLOCK_N)
    used = outputs < N
    offset = tl.cast(N, tl.int64) * K
    span = (tl.minimum(N - first, BLOCK_N) * K * (weight_ptr.dtype.element_ty.primitive_bitwidth // 8))
    span = span // 16 * 16
    start = weight_ptr + tl.cast(first, tl.int64) * K
    prefetch(start, span, PDL)
    if GATED:
        prefetch(start + offset, span, PDL)
    weight_at = weight_ptr + outputs.to(tl.int64)[:, None] * K
    x_at = x_ptr + rows[:, None] * x_stride
    wait(PDL)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ups = sums
    for k in tl.range(0, K, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = (columns < K)[None, :]
        x = tl.load(x_at + columns[None, :], mask=(rows < M)[:, None] & inside, other=0.0)
        weight = tl.load(weight_at + columns[None, :], mask=used[:, None] & inside, other=0.0)
        sums = tl.dot(x, weight.T, sums, input_precision="ieee")
        if GATED:
            up = tl.load(
                weight_at + offset + columns[None, :], mask=used[:, None] & inside, other=0.0
            )
            ups = tl.dot(x, up.T, ups, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias_ptr + outputs, mask=used, other=0.0).to(tl.float32)[None, :]
        if GATED:
            ups += tl.load(bias_ptr + N + outputs, mask=used, other=0.0).to(tl.float32)[None, :]
    y = activate(sums, ACTIVATION)
    if GATED:
        y *= ups
    out_at = out_ptr + rows[:, None] * N + outputs[None, :]
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


def gemv_tile(k: int, gated: bool) -> GemvTile:
    """64 weights a thread and matrix: enough loads in flight, few enough registers to overlap."""
    columns = triton.next_power_of_2(k)
    warps = 4 if columns <= 2048 else 8
    outputs = max(1, warps * 32 * 64 // columns // (2 if gated else 1))
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
) -> tuple[Tensor, Tensor]:
    """(act(norm(x + residual) Wᵀ + b), x + residual) for at most `GEMV_ROWS` rows."""
    rows, k = x_TK.shape
    gated = activation == "silu_gated"
    n = weight.shape[0] // (2 if gated else 1)
    tile = gemv_tile(k, gated)
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
    warps: int
    stages: int


def skinny_tile(m: int, n: int, gated: bool) -> SkinnyTile:
    rows = max(16, triton.next_power_of_2(m))
    outputs = 16 if n <= 4096 else 32 if n <= 16384 else 64
    return SkinnyTile(rows, outputs, 128 if gated else 256, 4, 3)


def skinny(
    x_TK: Tensor,
    weight: Packed,
    bias_N: Tensor | None,
    activation: Activation,
    out_dtype: torch.dtype,
    pdl: bool,
    tile: SkinnyTile | None = None,
) -> Tensor:
    """act(x Wᵀ + b) for at most `SKINNY_ROWS` rows, on tensor cores."""
    rows, k = x_TK.shape
    gated = activation == "silu_gated"
    n = weight.shape[0] // (2 if gated else 1)
    tile = tile or skinny_tile(rows, n, gated)
    out_TN = torch.empty(rows, n, dtype=out_dtype, device=x_TK.device)
    _skinny_kernel[(triton.cdiv(n, tile.outputs),)](
        x_TK,
        weight.tensors[0],
        bias_N,
        out_TN,
        rows,
        n,
        k,
        x_TK.stride(0),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=min(tile.columns, max(16, triton.next_power_of_2(k))),
        HAS_BIAS=bias_N is not None,
        ACTIVATION=KINDS[activation],
        GATED=gated,
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
    pdl: bool = False,
) -> Tensor:
    rows, k = x_TK.shape
    if rows <= GEMV_ROWS and k <= GEMV_COLUMNS:
        return gemv(x_TK, None, None, weight, bias_N, activation, x_TK.dtype, pdl)[0]
    if rows <= SKINNY_ROWS:
        return skinny(x_TK, weight, bias_N, activation, x_TK.dtype, pdl)
    return apply_activation(F.linear(x_TK, weight.tensors[0], bias_N), activation, pdl)


def norm_linear(
    x_TK: Tensor,
    residual_TK: Tensor | None,
    norm_weight_K: Tensor,
    norm_bias_K: Tensor | None,
    eps: float,
    weight: Packed,
    bias_N: Tensor | None,
    activation: Activation,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """(act(norm(x + residual) Wᵀ + b), x + residual): one launch for few rows, else two."""
    norm = Norm(norm_weight_K, norm_bias_K, eps)
    rows, k = x_TK.shape
    if rows <= GEMV_ROWS and k <= GEMV_COLUMNS:
        return gemv(x_TK, residual_TK, norm, weight, bias_N, activation, x_TK.dtype, pdl)
    normed_TK, total_TK = add_norm(x_TK, residual_TK, norm_weight_K, norm_bias_K, eps, pdl)
    return linear(normed_TK, weight, bias_N, activation, pdl), total_TK


def logits(x_LC: Tensor, head: Packed, pdl: bool = False) -> Tensor:
    """float32 out of the accumulators: rounding to bfloat16 first would make ties."""
    rows, k = x_LC.shape
    if rows <= GEMV_ROWS and k <= GEMV_COLUMNS:
        return gemv(x_LC, None, None, head, None, "none", torch.float32, pdl)[0]
    if rows <= SKINNY_ROWS:
        return skinny(x_LC, head, None, "none", torch.float32, pdl)
    if x_LC.is_cuda and x_LC.dtype != torch.float32:
        return torch.mm(x_LC, head.tensors[0].T, out_dtype=torch.float32)
    return F.linear(x_LC, head.tensors[0]).float()
