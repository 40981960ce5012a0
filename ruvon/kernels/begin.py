"""A step's ends on the device: it takes its inputs out of the host's memory itself, and puts its
results there. So nothing but a graph has to be launched for a step.

The host has several *boxes*, of which it fills one while the device is busy with others; the device
counts on which it is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.pdl import release, wait

BLOCK = 256


@triton.jit(do_not_specialize=["box_size", "num_words", "num_ids", "first_patch", "end_patches"])
def _begin_kernel(
    boxes_ptr,
    turn_ptr,
    words_ptr,
    last_tokens_ptr,
    tables_ptr,
    box_size,
    num_words,
    num_ids,
    first_patch,
    end_patches,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    box_ptr = boxes_ptr + tl.load(turn_ptr).to(tl.int64) * box_size
    inside = at < num_words
    word = tl.load(box_ptr + at, mask=inside, other=0)
    undrawn = (at < num_ids) & (word < 0)
    drawn = tl.load(last_tokens_ptr + (-1 - word), mask=undrawn, other=0)
    tl.store(words_ptr + at, tl.where(undrawn, drawn, word), mask=inside)
    place = (at >= first_patch) & (at < end_patches) & ((at - first_patch) % 2 == 0) & (word >= 0)
    block = tl.load(box_ptr + at + 1, mask=place, other=0)
    tl.store(tables_ptr + word, block, mask=place)


def begin(
    boxes_BW: Tensor,
    turn: Tensor,
    words: Tensor,
    last_tokens: Tensor,
    tables: Tensor,
    num_ids: int,
    patches: tuple[int, int],
    pdl: bool = False,
) -> None:
    """Copy the words of the box whose ``turn`` it is, as many as there are ``words``.

    The first ``num_ids`` are token ids, and ``-1 - seat`` among them becomes what that seat drew
    last. The words from the first to the second of ``patches`` are pairs (place, block), which
    ``tables``, taken as flat, gets too; a negative place is none.
    """
    _begin_kernel[(triton.cdiv(words.shape[0], BLOCK),)](
        boxes_BW,
        turn,
        words,
        last_tokens,
        tables,
        boxes_BW.shape[1],
        words.shape[0],
        num_ids,
        *patches,
        BLOCK=BLOCK,
        PDL=pdl,
        launch_pdl=pdl,
    )


@triton.jit(do_not_specialize=["size"])
def _end_kernel(
    results_ptr,
    boxes_ptr,
    turn_ptr,
    size,
    BOXES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    wait(PDL)
    turn = tl.load(turn_ptr)
    for start in tl.range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word = tl.load(results_ptr + at, mask=at < size, other=0)
        tl.store(boxes_ptr + turn * size + at, word, mask=at < size)
    tl.debug_barrier()  # every thread has read whose turn it is
    tl.store(turn_ptr, (turn + 1) % BOXES)


def end(results: Tensor, boxes: Tensor, turn: Tensor, pdl: bool = False) -> None:
    """Copy ``results`` into the box whose ``turn`` it is, and let it be the next one's turn."""
    _end_kernel[(1,)](
        results,
        boxes,
        turn,
        results.numel(),
        BOXES=boxes.shape[0],
        BLOCK=BLOCK,
        PDL=pdl,
        launch_pdl=pdl,
    )
