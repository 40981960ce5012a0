"""The start of a step on the device: what only the device knows is put in its place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.pdl import release, wait


@triton.jit
def _begin_kernel(
    ids_ptr,
    last_tokens_ptr,
    out_ptr,
    patches_ptr,
    tables_ptr,
    num_ids,
    num_patches,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    inside = at < num_ids
    ids = tl.load(ids_ptr + at, mask=inside, other=0)
    drawn = tl.load(last_tokens_ptr + (-1 - ids), mask=inside & (ids < 0), other=0)
    tl.store(out_ptr + at, tl.where(ids < 0, drawn, ids), mask=inside)
    inside = at < num_patches
    place = tl.load(patches_ptr + 2 * at, mask=inside, other=-1)
    block = tl.load(patches_ptr + 2 * at + 1, mask=inside, other=0)
    tl.store(tables_ptr + place, block, mask=inside & (place >= 0))


def begin(
    ids_T: Tensor,
    last_tokens: Tensor,
    out_T: Tensor,
    patches: Tensor,
    tables: Tensor,
    pdl: bool = False,
) -> None:
    """``out`` gets ids as they are, but for ``-1 - seat`` what that seat drew last. ``tables``,
    taken as flat, gets ``patches`` [n, 2] of (place, block); a negative place is none."""
    size = max(ids_T.shape[0], patches.shape[0])
    _begin_kernel[(triton.cdiv(size, 256),)](
        ids_T,
        last_tokens,
        out_T,
        patches,
        tables,
        ids_T.shape[0],
        patches.shape[0],
        BLOCK=256,
        PDL=pdl,
        launch_pdl=pdl,
    )
