"""Residual addition and normalisation in one pass: one program for each row."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, empty_like

from ruvon.kernels.pdl import release, wait


class Norm(NamedTuple):
    """The normalisation in front of a product: RMS without a bias, layer norm with one."""

    weight_C: Tensor
    bias_C: Tensor | None
    eps: float


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    total_ptr,
    num_columns,
    x_stride,
    eps,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    CENTERED: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    weight, bias = load_norm(weight_ptr, bias_ptr, columns, inside)
    wait(PDL)
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    at = row * num_columns + columns
    if HAS_RESIDUAL:
        x = x + tl.load(residual_ptr + at, mask=inside, other=0.0)
        tl.store(total_ptr + at, x, mask=inside)
    normed = normalize(x, weight, bias, inside, num_columns, eps, CENTERED)
    tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_norm(weight_ptr, bias_ptr, columns, inside):
    """(weight, bias) in float32, for `normalize`; where there is no such pointer anything."""
    weight = tl.zeros(columns.shape, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = weight
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def normalize(x, weight, bias, inside, num_columns, eps, CENTERED: tl.constexpr):
    """RMSNorm, or LayerNorm if ``CENTERED``, of one row ``[BLOCK]``, in float32."""
    wide = x.to(tl.float32)
    if CENTERED:
        mean = tl.sum(wide, axis=0) / num_columns
        wide = tl.where(inside, wide - mean, 0.0)
    variance = tl.sum(wide * wide, axis=0) / num_columns
    normed = wide * tl.rsqrt(variance + eps) * weight
    if CENTERED:
        normed += bias
    return normed


def rms_norm(
    x_TC: Tensor, residual_TC: Tensor | None, weight_C: Tensor, eps: float, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    return add_norm(x_TC, residual_TC, weight_C, None, eps, pdl)


def layer_norm(
    x_TC: Tensor,
    residual_TC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor,
    eps: float,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    return add_norm(x_TC, residual_TC, weight_C, bias_C, eps, pdl)


def add_norm(
    x_TC: Tensor,
    residual_TC: Tensor | None,
    weight_C: Tensor,
    bias_C: Tensor | None,
    eps: float,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """RMSNorm, or LayerNorm with a bias, of ``x + residual``, and that sum."""
    rows, columns = x_TC.shape
    normed_TC = empty_like(x_TC)
    total_TC = x_TC if residual_TC is None else empty_like(x_TC)
    block = triton.next_power_of_2(columns)
    _norm_kernel[(rows,)](
        x_TC,
        residual_TC,
        weight_C,
        bias_C,
        normed_TC,
        total_TC,
        columns,
        x_TC.stride(0),
        eps,
        BLOCK=block,
        HAS_RESIDUAL=residual_TC is not None,
        CENTERED=bias_C is not None,
        PDL=pdl,
        num_warps=4 if block <= 2048 else 8,
        launch_pdl=pdl,
    )
    return normed_TC, total_TC
