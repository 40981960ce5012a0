"""Products of 33 to 64 rows, bound by reading the weight: it streams through the copy engine.

Tiles of weight and rows come as bulk tensor copies, which take no registers and fetch nothing for
rows of padding, several of them in flight at once; long sums are split over programs, of which the
last to come adds up. Before it waits for the kernel in front (see `ruvon.kernels.pdl`), a program
asks for the first of its weights to be brought into L2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ruvon.kernels.activation import KINDS, activate
from ruvon.kernels.ops import Activation, Packed
from ruvon.kernels.pdl import prefetch, release, wait
from ruvon.kernels.split_k import Workspace, plan_split_k, reduce_split_k


@triton.jit(do_not_specialize=["M"])  # one variant for all numbers of rows
def _tma_kernel(
    x_desc,  # [M, K] in boxes of [BLOCK_M, BLOCK_K]
    weight_desc,  # [N, K] in boxes of [BLOCK_N, BLOCK_K]
    weight_ptr,
    bias_ptr,
    out_ptr,
    counters_ptr,
    partial_ptr,
    M,
    N,
    K: tl.constexpr,
    PER_SPLIT: tl.constexpr,  # columns of one program, a multiple of BLOCK_K
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    AHEAD: tl.constexpr,  # columns to ask for before the wait
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    tile, split = tl.program_id(0), tl.program_id(1)
    first_row = tl.program_id(2) * BLOCK_M
    first_output = tile * BLOCK_N
    first = split * PER_SPLIT
    outputs = first_output + tl.arange(0, BLOCK_N)
    used = outputs < N
    if AHEAD > 0:
        at = weight_ptr + tl.minimum(outputs, N - 1).to(tl.int64) * K + first
        num_columns = tl.minimum(AHEAD, tl.minimum(PER_SPLIT, K - first))
        element_bytes = weight_ptr.dtype.element_ty.primitive_bitwidth // 8
        prefetch(at, num_columns * element_bytes, PDL)
    wait(PDL)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in tl.range(first, tl.minimum(first + PER_SPLIT, K), BLOCK_K, num_stages=STAGES):
        x = x_desc.load([first_row, k])
        weight = weight_desc.load([first_output, k])
        sums = tl.dot(x, weight.T, sums, input_precision="ieee")
    sums, finishing = reduce_split_k(
        sums, tile, split, counters_ptr, partial_ptr, SPLIT_K, BLOCK_M, BLOCK_N
    )
    if finishing:
        if HAS_BIAS:
            sums += tl.load(bias_ptr + outputs, mask=used, other=0.0).to(tl.float32)[None, :]
        y = activate(sums, ACTIVATION).to(out_ptr.dtype.element_ty)
        rows = first_row + tl.arange(0, BLOCK_M)
        out_at = out_ptr + rows.to(tl.int64)[:, None] * N + outputs[None, :]
        tl.store(out_at, y, mask=(rows < M)[:, None] & used[None, :])


class TmaTile(NamedTuple):
    rows: int
    outputs: int
    columns: int
    split_k: int
    stages: int
    warps: int = 4
    ahead: int = 0


def tma_tile(m: int, n: int, k: int, gated: bool) -> TmaTile | None:
    """As measured on an H100 for GPT-2 XL; None where cuBLAS is as fast: it is up to 32 rows, for
    weights of up to 6 MB, where others are better anyway, and for tensors that cannot be copied in
    bulk."""
    if gated or not 32 < m <= 64 or n * k <= 3 << 20 or n > 16384 or k % 8:
        return None
    if n <= 3200 and k > 3200:
        return TmaTile(64, 32, 128, 2, 6, ahead=512)
    return TmaTile(64, 64 if n <= 4800 else 32, 128, 1, 6 if n <= 4800 else 4, ahead=512)


def tma_linear(
    x_TK: Tensor,
    weight: Packed,
    bias_N: Tensor | None,
    activation: Activation,
    workspace: Workspace,
    pdl: bool,
    tile: TmaTile,
) -> Tensor:
    """act(x Wᵀ + b)."""
    rows, k = x_TK.shape
    n = weight.shape[0]
    tiles, split_k, per_split = plan_split_k(n, k, tile.outputs, tile.columns, tile.split_k)
    out_TN = torch.empty(rows, n, dtype=x_TK.dtype, device=x_TK.device)
    weight_NK = weight.tensors[0]
    _tma_kernel[(tiles, split_k, triton.cdiv(rows, tile.rows))](
        TensorDescriptor.from_tensor(x_TK, [tile.rows, tile.columns]),
        TensorDescriptor.from_tensor(weight_NK, [tile.outputs, tile.columns]),
        weight_NK,
        bias_N,
        out_TN,
        workspace.counters,
        workspace.partial,
        rows,
        n,
        K=k,
        PER_SPLIT=per_split,
        SPLIT_K=split_k,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.columns,
        HAS_BIAS=bias_N is not None,
        ACTIVATION=KINDS[activation],
        AHEAD=tile.ahead,
        STAGES=tile.stages,
        PDL=pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
    return out_TN
