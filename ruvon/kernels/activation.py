"""Activation functions, for the ends of products (in Triton) and by themselves."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.ops import GATED, Activation
from ruvon.kernels.pdl import release, wait

KINDS: dict[Activation, int] = {
    "none": 0,
    "gelu_tanh": 1,
    "gelu": 2,
    "relu": 3,
    "silu": 4,
    "silu_gated": 5,
    "gelu_tanh_gated": 6,
}
"""What a kernel's constant ``ACTIVATION`` stands for."""


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, KIND: tl.constexpr):
    """float32 in and out; a gated kind is its gate's function alone."""
    if KIND == 1 or KIND == 6:  # tanh(z) = 2 sigmoid(2 z) - 1, so x (1 + tanh z) / 2 is this
        x = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == 2:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == 3:
        x = tl.maximum(x, 0.0)
    elif KIND == 4 or KIND == 5:
        x = x * sigmoid(x)
    return x


@triton.jit
def _activation_kernel(
    x_ptr,
    out_ptr,
    num_columns,
    x_stride,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    wait(PDL)
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside).to(tl.float32)
    y = activate(x, KIND)
    if GATED:
        y *= tl.load(x_ptr + row * x_stride + num_columns + columns, mask=inside).to(tl.float32)
    tl.store(out_ptr + row * num_columns + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


def apply_activation(x_TN: Tensor, activation: Activation, pdl: bool = False) -> Tensor:
    """The activation alone, after a product that could not take it along."""
    if activation == "none":
        return x_TN
    gated = activation in GATED
    rows, columns = x_TN.shape[0], x_TN.shape[1] // (2 if gated else 1)
    out_TN = x_TN.new_empty(rows, columns)
    block = min(1024, triton.next_power_of_2(columns))
    _activation_kernel[(rows, triton.cdiv(columns, block))](
        x_TN,
        out_TN,
        columns,
        x_TN.stride(0),
        BLOCK=block,
        KIND=KINDS[activation],
        GATED=gated,
        PDL=pdl,
        launch_pdl=pdl,
    )
    return out_TN
