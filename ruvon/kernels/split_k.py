"""Long sums of a product split over programs: the last to come adds up what the others left."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT_K_PROGRAMS = 640  # at most, where sums are split


class Workspace(NamedTuple):
    """Where programs that share an output tile leave their sums. Counters are zero between uses."""

    counters: Tensor  # int32, one a tile
    partial: Tensor  # float32 [tile, split, rows, outputs]


def make_workspace(device: torch.device) -> Workspace:
    """Enough for `SPLIT_K_PROGRAMS` programs of the largest tile."""
    return Workspace(
        torch.zeros(SPLIT_K_PROGRAMS, dtype=torch.int32, device=device),
        torch.empty(SPLIT_K_PROGRAMS * 64 * 64, dtype=torch.float32, device=device),
    )


def plan_split_k(n: int, k: int, outputs: int, columns: int, wanted: int) -> tuple[int, int, int]:
    """(tiles of outputs, programs that share one, columns of each program), for about ``wanted``
    programs a tile and whole blocks of ``columns``."""
    per_split = triton.cdiv(triton.cdiv(k, wanted), columns) * columns
    tiles, split_k = triton.cdiv(n, outputs), triton.cdiv(k, per_split)
    assert split_k == 1 or tiles * split_k <= SPLIT_K_PROGRAMS
    return tiles, split_k, per_split


@triton.jit
def reduce_split_k(
    sums,
    tile,
    split,
    counters_ptr,
    partial_ptr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(the tile's sums over all splits, whether this program has them and is to finish)."""
    finishing = tile >= 0
    if SPLIT_K > 1:
        tile_ptr = partial_ptr + tile * SPLIT_K * BLOCK_M * BLOCK_N
        cells = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(tile_ptr + split * BLOCK_M * BLOCK_N + cells, sums)
        tl.debug_barrier()  # every thread's part is written before one thread says so
        finishing = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
        if finishing:
            tl.store(counters_ptr + tile, 0)
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for other in tl.static_range(SPLIT_K):  # in order, whoever came last
                its = tile_ptr + other * BLOCK_M * BLOCK_N + cells
                sums += tl.load(its, cache_modifier=".cg")
    return sums, finishing
