"""Matrix products: which kernel multiplies how many rows by what weight.

One or two rows, and with them the norm in front, go to `ruvon.kernels.gemv`; rows up to
`STREAMED_ROWS`, logits of any number of rows and weights kept as codes to `ruvon.kernels.matmul`;
more rows of plain numbers to cuBLAS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ruvon.kernels.activation import apply_activation
from ruvon.kernels.codes import take_rows
from ruvon.kernels.gemv import GEMV_COLUMNS, GEMV_ROWS, gemv
from ruvon.kernels.gemv_codes import GEMV_CODES_COLUMNS
from ruvon.kernels.matmul import Tile, matmul
from ruvon.kernels.norm import Norm, add_norm
from ruvon.kernels.ops import GATED, Activation, Packed
from ruvon.kernels.split_k import Workspace
from ruvon.kernels.tiles import LARGE, STREAMED_ROWS, batch_invariant_tile, choose_tile

DEQUANTIZED_ROWS = 256
"""From so many rows on codes are made plain numbers first: it is little beside the product, which
cuBLAS then does faster."""

LOGITS_ROWS, LOGITS_COLUMNS, LOGITS_LINE = 128, 2048, 8
"""With more rows of so many columns cuBLAS is faster for plain heads; it, too, rounds nothing.
Where a row of logits begins on no boundary (GPT-2's 50,257) it takes four times as long."""

GATED_ROWS = 128  # of plain weights of gated products, if large: cuBLAS does not gate


def fits_gemv(rows: int, weight: Packed) -> bool:
    most = GEMV_COLUMNS if weight.kind == "dense" else GEMV_CODES_COLUMNS
    return rows <= GEMV_ROWS and weight.shape[1] <= most


def choose_kernel(
    rows: int, weight: Packed, gated: bool, dtype: torch.dtype, scores: bool = False
) -> int | Tile | None:
    """The number of rows where there is a kernel for it, a tile of `matmul`, or None: cuBLAS."""
    if fits_gemv(rows, weight):
        return rows
    codes = weight.kind != "dense"
    large = gated and weight.shape[0] >= LARGE
    most = DEQUANTIZED_ROWS - 1 if codes else GATED_ROWS if large else STREAMED_ROWS
    return choose_tile(rows, weight, gated, dtype) if rows <= most or scores else None


def linear(
    x_TK: Tensor,
    weight: Packed,
    bias_N: Tensor | None,
    activation: Activation,
    workspace: Workspace,
    pdl: bool = False,
) -> Tensor:
    chosen = choose_kernel(len(x_TK), weight, activation in GATED, x_TK.dtype)
    if isinstance(chosen, Tile):
        return matmul(x_TK, weight, bias_N, activation, x_TK.dtype, workspace, pdl, chosen)
    if chosen is not None:
        return gemv(x_TK, None, None, weight, bias_N, activation, x_TK.dtype, pdl)[0]
    codes = weight.kind != "dense"
    dense_NK = take_rows(weight, None, x_TK.dtype, pdl) if codes else weight.tensors[0]
    if activation == "gelu_tanh" and bias_N is not None and x_TK.is_cuda:
        return torch._addmm_activation(bias_N, x_TK, dense_NK.T, use_gelu=True)  # cuBLAS's is tanh
    return apply_activation(F.linear(x_TK, dense_NK, bias_N), activation, pdl)


def linear_into(
    x_TK: Tensor, weight: Packed, bias_N: Tensor | None, y_TN: Tensor, pdl: bool = False
) -> Tensor:
    """`linear` of many rows, without an activation, in place of ``y_TN``, which it returns."""
    codes = weight.kind != "dense"
    dense_NK = take_rows(weight, None, x_TK.dtype, pdl) if codes else weight.tensors[0]
    if bias_N is None:
        return torch.mm(x_TK, dense_NK.T, out=y_TN)
    return torch.addmm(bias_N, x_TK, dense_NK.T, out=y_TN)


def batch_invariant_linear(
    x_TK: Tensor,
    weight: Packed,
    bias_N: Tensor | None,
    activation: Activation,
    workspace: Workspace,
    pdl: bool = False,
) -> Tensor:
    """`linear`, with the same bits for a row whatever the others are, and how many."""
    tile = batch_invariant_tile(x_TK.shape[0], weight, activation in GATED, x_TK.dtype)
    return matmul(x_TK, weight, bias_N, activation, x_TK.dtype, workspace, pdl, tile)


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
    if fits_gemv(x_TK.shape[0], weight):
        norm = Norm(norm_weight_K, norm_bias_K, eps)
        return gemv(x_TK, residual_TK, norm, weight, bias_N, activation, x_TK.dtype, pdl)
    normed_TK, total_TK = add_norm(x_TK, residual_TK, norm_weight_K, norm_bias_K, eps, pdl)
    return linear(normed_TK, weight, bias_N, activation, workspace, pdl), total_TK


def logits(x_LC: Tensor, head: Packed, workspace: Workspace, pdl: bool = False) -> Tensor:
    """float32 out of the accumulators: rounding to bfloat16 first would make ties."""
    outputs, columns = head.shape
    large = len(x_LC) > LOGITS_ROWS and columns >= LOGITS_COLUMNS and outputs % LOGITS_LINE == 0
    if large and head.kind == "dense" and x_LC.is_cuda:
        return torch.mm(x_LC, head.tensors[0].T, out_dtype=torch.float32)
    chosen = choose_kernel(len(x_LC), head, False, x_LC.dtype, scores=True)
    if isinstance(chosen, Tile):
        return matmul(x_LC, head, None, "none", torch.float32, workspace, pdl, chosen)
    return gemv(x_LC, None, None, head, None, "none", torch.float32, pdl)[0]


def batch_invariant_logits(
    x_LC: Tensor, head: Packed, workspace: Workspace, pdl: bool = False
) -> Tensor:
    """`logits`, as `batch_invariant_linear` is `linear`."""
    tile = batch_invariant_tile(x_LC.shape[0], head, False, x_LC.dtype)
    return matmul(x_LC, head, None, "none", torch.float32, workspace, pdl, tile)
