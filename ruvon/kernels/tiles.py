"""Which tiles `ruvon.kernels.matmul` takes for a product, as measured on an H100 (docs/log.md)."""

from __future__ import annotations

import torch

from ruvon.kernels.matmul import Tile
from ruvon.kernels.ops import Packed

STREAMED_ROWS = 64  # with more, cuBLAS is as fast for plain weights


def choose_tile(m: int, weight: Packed, gated: bool, dtype: torch.dtype) -> Tile:
    n, k = weight.shape
    if dtype == torch.float32:
        return float32_tile(m)
    if weight.kind != "dense":
        return codes_tile(m, gated)
    if m > 64:
        return Tile(128, 64 if gated else 128, 64, 3 if gated else 4, warps=8)
    rows = 16 if m <= 16 else 32 if m <= 32 else 64
    outputs = n // 2 if gated else n
    if outputs >= 8192:
        return Tile(rows, 64, 128, 3 if gated else 5, ahead=512)
    return (
        Tile(rows, 32, 128, 4, swap=False, ahead=512)
        if rows == 64
        else Tile(rows, 64, 128, 5, split_k=split_k(outputs, k), ahead=512)
    )


def split_k(n: int, k: int) -> int:
    """Programs that share a tile of 64 outputs, so that all together are some two for each of 132
    multiprocessors, and have eight blocks of columns or more each."""
    return max(1, min(264 // -(-n // 64), k // 1024))


def codes_tile(m: int, gated: bool) -> Tile:
    rows = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 else 128
    if rows == 128:
        return Tile(128, 64 if gated else 128, 64, 4, warps=4 if gated else 8)
    return Tile(rows, 64, 128, 5, ahead=512)


def float32_tile(m: int) -> Tile:
    """No matrix unit multiplies float32 as it is, so a tile is what registers add up."""
    return Tile(16 if m <= 16 else 64, 32, 64, 3)


def batch_invariant_tile(m: int, weight: Packed, gated: bool, dtype: torch.dtype) -> Tile:
    """Tiles of one kind of matrix instruction, which adds up a row's products in one order: so a
    row comes out the same to the last bit among however many others."""
    if dtype == torch.float32:
        return Tile(16, 32, 64, 3)
    if weight.kind != "dense":
        return codes_tile(m, gated)
    if m <= 64:
        return Tile(16 if m <= 16 else 64, 64, 128, 3 if gated else 4)
    return Tile(128, 64 if gated else 128, 64, 3 if gated else 4, warps=8)
