"""Products of one or two rows, with the residual addition and the norm in front of them.

Such a product is bound by reading its weight once. A program has a few weight rows and loads them
whole into registers *before* it waits for the kernel in front of it (see `ruvon.kernels.pdl`); and
it can apply the residual addition and the norm itself, so that a layer is five launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.activation import KINDS, activate
from ruvon.kernels.gemv_codes import GemvTile, gemv_codes
from ruvon.kernels.norm import Norm, load_norm
from ruvon.kernels.ops import GATED, Activation, Packed
from ruvon.kernels.pdl import release, wait

GEMV_ROWS = 2
GEMV_COLUMNS = 8192  # a weight row longer than this does not fit the registers


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
    gain, shift = load_norm(norm_weight_ptr, norm_bias_ptr, columns, inside)
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
    if weight.kind != "dense":
        return gemv_codes(x_TK, residual_TK, norm, weight, bias_N, activation, out_dtype, pdl, tile)
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
