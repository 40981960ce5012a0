"""Products bound by reading the weight: 3 to some 100 rows, and weights kept as codes.

The weight is the side of the matrix instruction that takes 64 at a time and rows are the side that
takes as few as 16, so that nothing is computed for rows that are not there. Tiles of weight stream
through shared memory, several in flight at once: plain ones as bulk tensor copies, codes (see
`ruvon.kernels.codes`) by copies of 16 bytes; these become numbers in the registers that the
instruction reads. Long sums are split over programs where outputs alone would not fill the chip.
Before it waits for the kernel in front (see `ruvon.kernels.pdl`), a program asks for the first of
its weights to be brought into L2: no more than L2 holds of all programs'.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ruvon.kernels.activation import KINDS, activate
from ruvon.kernels.codes import codes_of, scale_int4, scale_int8, spread
from ruvon.kernels.ops import GATED, Activation, Packed
from ruvon.kernels.pdl import prefetch, release, wait
from ruvon.kernels.split_k import Workspace, plan_split_k, reduce_split_k

STRIDED, BULK, CODES_8, CODES_4 = range(4)
"""What a kernel's constant ``FORMAT`` stands for: plain numbers by pointers or in bulk, codes."""


@triton.jit
def multiply(weight, x, sums, SWAP: tl.constexpr):
    if SWAP:
        sums = tl.dot(weight.to(x.dtype), x.T, sums, input_precision="ieee")
    else:
        sums = tl.dot(x, weight.to(x.dtype).T, sums, input_precision="ieee")
    return sums


@triton.jit
def load_strided(pointers, columns, K):
    return tl.load(pointers[:, None] + columns[None, :], mask=(columns < K)[None, :], other=0.0)


@triton.jit
def load_rows(x_at, used, columns, K):
    mask = used[:, None] & (columns < K)[None, :]
    return tl.load(x_at[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def multiply_int8(
    weight_at, outputs, x, sums, k, K, tables, SWAP: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, HAS_OFFSETS: tl.constexpr, PACKED_MATH: tl.constexpr,
):  # fmt: skip
    """Groups beyond the last have scale and offset 0."""
    scales_ptr, offsets_ptr, stride, num_groups = tables
    columns = k + tl.arange(0, BLOCK_K)
    groups = k // GROUP + tl.arange(0, BLOCK_K // GROUP)
    inside = (columns < K)[None, :]
    codes = tl.load(weight_at[:, None] + columns[None, :], mask=inside, other=0)
    scale = spread(scales_ptr, groups, num_groups, outputs, stride, GROUP, PACKED_MATH)
    offset = tl.zeros_like(scale)
    if HAS_OFFSETS:
        offset = spread(offsets_ptr, groups, num_groups, outputs, stride, GROUP, PACKED_MATH)
    weight = scale_int8(codes, scale, offset, HAS_OFFSETS, PACKED_MATH)
    return multiply(weight, x, sums, SWAP)


@triton.jit
def multiply_int4(
    weight_at, outputs, x, x_high, sums, k, width, tables, SWAP: tl.constexpr,
    BLOCK_K: tl.constexpr, PACKED_MATH: tl.constexpr,
):  # fmt: skip
    """``x`` has the columns of the bytes' low halves, ``x_high`` those of the high ones."""
    scales_ptr, offsets_ptr, stride, num_groups = tables
    places = k // 2 + tl.arange(0, BLOCK_K // 2)
    groups = k // 32 + 2 * tl.arange(0, BLOCK_K // 64)
    inside = (places < width)[None, :]
    codes = tl.load(weight_at[:, None] + places[None, :], mask=inside, other=0)
    scale = spread(scales_ptr, groups, num_groups, outputs, stride, 32, PACKED_MATH)
    offset = spread(offsets_ptr, groups, num_groups, outputs, stride, 32, PACKED_MATH)
    high_scale = spread(scales_ptr, groups + 1, num_groups, outputs, stride, 32, PACKED_MATH)
    high_offset = spread(offsets_ptr, groups + 1, num_groups, outputs, stride, 32, PACKED_MATH)
    low, high = scale_int4(codes, scale, offset, high_scale, high_offset, PACKED_MATH)
    return multiply(high, x_high, multiply(low, x, sums, SWAP), SWAP)


@triton.jit(do_not_specialize=["M", "num_groups"])  # one variant for all numbers of rows
def _matmul_kernel(
    x_ptr,
    x_desc,  # [M, K] in boxes of [BLOCK_M, BLOCK_K]; with the next, where FORMAT is BULK
    weight_ptr,
    weight_desc,  # [N, K] in boxes of [BLOCK_N, BLOCK_K]
    scales_ptr,
    offsets_ptr,
    bias_ptr,
    out_ptr,
    counters_ptr,
    partial_ptr,
    M,
    N,
    K,
    per_split,  # columns of one program, a multiple of BLOCK_K
    x_stride,
    weight_stride,
    table_stride,
    num_groups,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    PACKED_MATH: tl.constexpr,  # of bfloat16, two at a time, by instructions of NVIDIA's
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,  # then BLOCK_N counts both halves' outputs once, and sums are not split
    AHEAD: tl.constexpr,  # bytes of each weight row to ask for before the wait
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    split, tile = tl.program_id(1), tl.program_id(2)  # rows first: they share a tile of weight
    first_row, first_output = tl.program_id(0) * BLOCK_M, tile * BLOCK_N
    rows, outputs = first_row + tl.arange(0, BLOCK_M), first_output + tl.arange(0, BLOCK_N)
    present, used = rows < M, outputs < N
    first = split * per_split
    last = tl.minimum(first + per_split, K)
    weight_at = weight_ptr + tl.minimum(outputs, N - 1).to(tl.int64) * weight_stride
    up_at = weight_at + tl.cast(N, tl.int64) * weight_stride
    if AHEAD > 0:
        begin = first // 2 if FORMAT == 3 else first
        prefetch(weight_at + begin, AHEAD, PDL)
        if GATED:
            prefetch(up_at + begin, AHEAD, PDL)
    wait(PDL)
    x_at = x_ptr + rows.to(tl.int64) * x_stride
    tables = (scales_ptr, offsets_ptr, table_stride, num_groups)
    sums = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    ups = sums
    for k in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        if FORMAT == 0:
            columns = k + tl.arange(0, BLOCK_K)
            x = load_rows(x_at, present, columns, K)
            sums = multiply(load_strided(weight_at, columns, K), x, sums, SWAP)
            if GATED:
                ups = multiply(load_strided(up_at, columns, K), x, ups, SWAP)
        elif FORMAT == 1:
            x = x_desc.load([first_row, k])
            sums = multiply(weight_desc.load([first_output, k]), x, sums, SWAP)
            if GATED:
                ups = multiply(weight_desc.load([first_output + N, k]), x, ups, SWAP)
        elif FORMAT == 2:
            x = load_rows(x_at, present, k + tl.arange(0, BLOCK_K), K)
            sums = multiply_int8(
                weight_at, outputs, x, sums, k, K, tables,
                SWAP, BLOCK_K, GROUP, HAS_OFFSETS, PACKED_MATH,
            )  # fmt: skip
            if GATED:
                ups = multiply_int8(
                    up_at, N + outputs, x, ups, k, K, tables,
                    SWAP, BLOCK_K, GROUP, HAS_OFFSETS, PACKED_MATH,
                )  # fmt: skip
        else:
            at = tl.arange(0, BLOCK_K // 2)
            columns = k + at // 32 * 64 + at % 32
            x = load_rows(x_at, present, columns, K)
            x_high = load_rows(x_at, present, columns + 32, K)
            sums = multiply_int4(
                weight_at, outputs, x, x_high, sums, k, weight_stride, tables,
                SWAP, BLOCK_K, PACKED_MATH,
            )  # fmt: skip
            if GATED:
                ups = multiply_int4(
                    up_at, N + outputs, x, x_high, ups, k, weight_stride, tables,
                    SWAP, BLOCK_K, PACKED_MATH,
                )  # fmt: skip
    if SWAP:
        sums, ups = sums.T, ups.T
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
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=present[:, None] & used[None, :])


class Tile(NamedTuple):
    """``rows`` by ``outputs``, ``columns`` at a time and so many times ``stages`` in flight."""

    rows: int
    outputs: int
    columns: int
    stages: int
    split_k: int = 1
    warps: int = 4
    swap: bool = True  # whether the weight is the side that takes 64 at a time
    ahead: int = 0


def matmul(
    x_TK: Tensor,
    weight: Packed,
    bias_N: Tensor | None,
    activation: Activation,
    out_dtype: torch.dtype,
    workspace: Workspace,
    pdl: bool,
    tile: Tile,
) -> Tensor:
    """act(x Wᵀ + b)."""
    rows, k = x_TK.shape
    gated = activation in GATED
    n = weight.shape[0] // (2 if gated else 1)
    weight_format = format_of(x_TK, weight)
    scales = offsets = None
    weight_tensor, group, num_groups = weight.tensors[0], 32, 0
    if weight.kind != "dense":
        weight_tensor, scales, offsets = codes_of(weight)
        group, num_groups = codes_of(weight).group(k), len(scales)
    bulk = weight_format == BULK
    if weight.kind == "dense":
        tile = tile._replace(columns=min(tile.columns, max(64, triton.next_power_of_2(k))))
    tiles, split_k, per_split = plan_split_k(n, k, tile.outputs, tile.columns, tile.split_k)
    out_TN = torch.empty(rows, n, dtype=out_dtype, device=x_TK.device)
    row_tiles = triton.cdiv(rows, tile.rows)
    assert split_k == 1 or row_tiles == 1
    _matmul_kernel[(row_tiles, split_k, tiles)](
        x_TK,
        TensorDescriptor.from_tensor(x_TK, [tile.rows, tile.columns]) if bulk else None,
        weight_tensor,
        TensorDescriptor.from_tensor(weight_tensor, [tile.outputs, tile.columns]) if bulk else None,
        scales,
        offsets,
        bias_N,
        out_TN,
        workspace.counters,
        workspace.partial,
        rows,
        n,
        k,
        per_split,
        x_TK.stride(0),
        weight_tensor.stride(0),
        0 if scales is None else scales.stride(0),
        num_groups,
        FORMAT=weight_format,
        GROUP=group,
        HAS_OFFSETS=offsets is not None,
        PACKED_MATH=scales is not None and x_TK.is_cuda and x_TK.dtype == torch.bfloat16,
        SPLIT_K=split_k,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.outputs,
        BLOCK_K=tile.columns,
        SWAP=tile.swap,
        HAS_BIAS=bias_N is not None,
        ACTIVATION=KINDS[activation],
        GATED=gated,
        AHEAD=tile.ahead if weight_tensor.stride(0) * weight_tensor.element_size() % 16 == 0 else 0,
        STAGES=tile.stages,
        PDL=pdl,
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=pdl,
    )
    return out_TN


def format_of(x_TK: Tensor, weight: Packed) -> int:
    """How the kernel is to read this weight beside these rows."""
    if weight.kind != "dense":
        return CODES_8 if weight.kind == "int8" else CODES_4
    aligned = x_TK.is_contiguous() and weight.shape[1] * x_TK.element_size() % 16 == 0
    return BULK if aligned else STRIDED
