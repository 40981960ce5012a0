"""Which tiles `ruvon.kernels.matmul` takes for a product, as measured on an H200 (docs/log.md)."""

from __future__ import annotations

import torch

from ruvon.kernels.matmul import Tile
from ruvon.kernels.ops import Packed

STREAMED_ROWS = 64  # with more, cuBLAS is as fast for plain weights
LARGE = 16384  # outputs: more programs than run at once, which fetch for each other


def choose_tile(m: int, weight: Packed, gated: bool, dtype: torch.dtype) -> Tile:
    n, k = weight.shape
    if dtype == torch.float32:
        return float32_tile(m)
    if weight.kind != "dense":
        return codes_tile(m, n, k, weight.kind, gated)
    if m > STREAMED_ROWS:
        return Tile(128, 128, 64, 4 if gated else 6, warps=8)
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    if n >= LARGE or gated:
        return Tile(rows, 64, 128, 4 if gated else 6)
    ahead = 256 if n * k < 10 << 20 or rows == 64 else 512
    if 2816 < n <= 4096 and k >= 2048 and rows < 64:  # tiles for half of the multiprocessors
        return Tile(rows, 64, 128, 6, 2, ahead=ahead)
    if n > 2816:
        return Tile(rows, 64, 128, 6, ahead=ahead)
    return small_tile(rows, n, k)._replace(ahead=ahead)


def small_tile(rows: int, n: int, k: int) -> Tile:
    """Too few tiles of 64 outputs for all multiprocessors: smaller ones, or sums that are split."""
    if n > 2048 and k <= 1024:
        return Tile(16, 32, 128, 4, swap=False) if rows == 16 else Tile(64, 32, 256, 3, swap=False)
    if rows < 64:
        split_k = 4 if k >= (2048 if n <= 1024 else 6144) else 2 if k >= 1536 else 1
        return Tile(rows, 64, 128, 6, split_k)
    if k >= 6144:
        return Tile(64, 32, 128, 4, 4, swap=False)
    return Tile(64, 16, 256, 4, 4 if n <= 256 else 2 if k >= 3072 else 1, swap=False)


def codes_tile(m: int, n: int, k: int, kind: str, gated: bool) -> Tile:
    """Making numbers of codes takes as long as reading them, so the more programs the better."""
    tile = batch_invariant_codes_tile(m, kind, gated)
    if m > STREAMED_ROWS or gated or n >= LARGE:
        return tile
    return tile._replace(split_k=max(1, min(4, 512 * 64 // n, k // 512)))


def batch_invariant_codes_tile(m: int, kind: str, gated: bool) -> Tile:
    """One number of columns for all rows: it says in which order four-bit codes' are added."""
    rows = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    columns, stages = (128, 3) if kind == "int8" else (256, 2 if gated and rows == 128 else 3)
    return Tile(rows, 64, columns, stages)


def float32_tile(m: int) -> Tile:
    """No matrix unit multiplies float32 as it is, so a tile is what registers add up."""
    return Tile(16 if m <= 16 else 64, 32, 64, 3)


def batch_invariant_tile(m: int, weight: Packed, gated: bool, dtype: torch.dtype) -> Tile:
    """Tiles of one kind of matrix instruction, which adds up a row's products in one order: so a
    row comes out the same to the last bit among however many others."""
    if dtype == torch.float32:
        return Tile(16, 32, 64, 3)
    if weight.kind != "dense":
        return batch_invariant_codes_tile(m, weight.kind, gated)
    if m > STREAMED_ROWS:
        return Tile(128, 128, 64, 4 if gated else 6, warps=8)
    return Tile(16 if m <= 16 else 32 if m <= 32 else 64, 64, 128, 4)
