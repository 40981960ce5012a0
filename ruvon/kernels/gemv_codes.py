"""Products of one or two rows and a weight kept as codes (see `ruvon.kernels.codes`).

As `ruvon.kernels.gemv`, but by whole numbers: a row becomes `Digits` of them, and an instruction
that multiplies four bytes by four and adds them up takes two steps to four weights. Bytes made to
floats took four times as many. A program holds its weights in registers when the row comes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ruvon.kernels.activation import KINDS
from ruvon.kernels.codes import codes_of
from ruvon.kernels.digits import quantize
from ruvon.kernels.gemv_int4 import gemv_int4_kernel
from ruvon.kernels.gemv_int8 import gemv_int8_kernel
from ruvon.kernels.norm import Norm
from ruvon.kernels.ops import GATED, Activation, Packed

GEMV_CODES_COLUMNS = 16384  # of a row that fits the registers


class GemvTile(NamedTuple):
    outputs: int
    columns: int
    warps: int


def gemv_codes_tile(n: int, width: int, gated: bool, int8: bool) -> GemvTile:
    """For so many outputs of ``width`` bytes each, as measured on an H100: bytes a thread that make
    up for what it does to its part of the row, but two programs or more for each of 132
    multiprocessors."""
    columns = triton.next_power_of_2(width)
    warps = 4 if columns <= 4096 else 8
    most = warps * 32 * (128 if int8 else 256) // columns // (2 if gated else 1)
    fair = 1 << max(0, (n // 264).bit_length() - 1)
    return GemvTile(max(1, min(most, fair, 16)), columns, warps)


def gemv_codes(
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
    """`gemv` of a weight that is kept as codes."""
    rows, k = x_TK.shape
    gated, int8 = activation in GATED, weight.kind == "int8"
    n = weight.shape[0] // (2 if gated else 1)
    codes, scales, offsets = codes_of(weight)
    width = codes_of(weight).group(k) if int8 else 32
    columns = codes.stride(0) * (1 if int8 else 2)
    total_TK, (digits, tables) = quantize(x_TK, residual_TK, norm, width, columns, int8, pdl)
    tile = tile or gemv_codes_tile(n, codes.stride(0), gated, int8)
    out_TN = torch.empty(rows, n, dtype=out_dtype, device=x_TK.device)
    kernel = gemv_int8_kernel if int8 else gemv_int4_kernel
    kernel[(triton.cdiv(n, tile.outputs),)](
        digits.view(torch.int64 if int8 else torch.int32),
        tables.view(torch.int64) if int8 else tables,
        codes.view(torch.int32),
        scales,
        offsets,
        bias_N,
        out_TN,
        n,
        columns // 4,
        columns // width,
        codes.stride(0) // 4,
        scales.stride(0),
        len(scales),
        ROWS=rows,
        BLOCK_N=tile.outputs,
        UNITS=tile.columns // width,
        WORDS=width // 4,
        HAS_OFFSETS=offsets is not None,
        NATIVE=x_TK.is_cuda,
        HAS_BIAS=bias_N is not None,
        ACTIVATION=KINDS[activation],
        GATED=gated,
        PDL=pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
    return out_TN, total_TK
