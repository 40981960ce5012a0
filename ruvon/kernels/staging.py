"""A step's ends on the device: it takes its inputs out of the host's memory itself, and puts its
results there. So nothing but a graph has to be launched for a step.

The host has several *staging buffers*, of which it fills one while the device is busy with others;
the device counts on whose turn it is. Inputs are 32-bit words, of which the device keeps a copy. In
steady decode it needs nearly none of them: it knows what each sequence has sampled, and counts its
own copy up.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.pdl import release, wait
from ruvon.kernels.sample import DRAW, MASK, PARAMS, SLOT

BLOCK = 256


@triton.jit
def _copy(
    staging_ptr, words_ptr, last_tokens_ptr, tables_ptr, at, num_words, num_ids, patches, end
):
    """Take a step's words as they are, but for placeholders and patches of block tables."""
    inside = at < num_words
    word = tl.load(staging_ptr + at, mask=inside, other=0)
    placeholder = (at < num_ids) & (word < 0)
    sampled = tl.load(last_tokens_ptr + (-1 - word), mask=placeholder, other=0)
    tl.store(words_ptr + at, tl.where(placeholder, sampled, word), mask=inside)
    place = (at >= patches) & (at < end) & ((at - patches) % 2 == 0) & (word >= 0)
    block = tl.load(staging_ptr + at + 1, mask=place, other=0)
    tl.store(tables_ptr + word, block, mask=place)


@triton.jit(
    do_not_specialize=[
        "staging_size", "num_words", "num_ids", "positions", "slots", "context_lens", "logit_rows",
        "first_param", "mode", "new_blocks", "patches", "end", "num_rows", "slot_stride",
        "table_size", "width", "page",
    ]
)  # fmt: skip
def _load_inputs_kernel(
    staging_ptr, turn_ptr, words_ptr, last_tokens_ptr, tables_ptr,
    staging_size, num_words,
    num_ids, positions, slots, context_lens, logit_rows, first_param, mode, new_blocks,
    patches, end, num_rows, slot_stride, table_size, width, page,
    PARAMS: tl.constexpr, SLOT: tl.constexpr, DRAW: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    staging_ptr += tl.load(turn_ptr).to(tl.int64) * staging_size
    if tl.load(staging_ptr + mode) == 0:
        _copy(
            staging_ptr, words_ptr, last_tokens_ptr, tables_ptr, at, num_words, num_ids, patches,
            end,
        )  # fmt: skip
    else:  # every row goes on where it was, with the token it has sampled
        param_ptr = words_ptr + first_param + at * PARAMS
        slot = tl.load(param_ptr + SLOT, mask=at < num_rows, other=-1)
        used = slot >= 0
        token_ptr = words_ptr + tl.load(words_ptr + logit_rows + at, mask=used, other=0)
        position = tl.load(token_ptr + positions, mask=used, other=0) + 1
        for group in tl.static_range(GROUPS):
            place_ptr = tables_ptr + group * table_size + slot * width + position // page
            new_ptr = staging_ptr + new_blocks + group * num_rows + at
            new_block = tl.load(new_ptr, mask=used, other=-1)
            grown = used & (new_block >= 0)
            tl.store(place_ptr, new_block, mask=grown)
            block = tl.load(place_ptr, mask=used & (new_block < 0), other=0)
            block = tl.where(grown, new_block, block)
            slot_ptr = token_ptr + slots + group * slot_stride
            tl.store(slot_ptr, block * page + position % page, mask=used)
        tl.store(token_ptr, tl.load(last_tokens_ptr + slot, mask=used, other=0), mask=used)
        tl.store(token_ptr + positions, position, mask=used)
        tl.store(words_ptr + context_lens + slot, position + 1, mask=used)
        draw = tl.load(param_ptr + DRAW, mask=used, other=0)
        tl.store(param_ptr + DRAW, draw + 1, mask=used)


def load_inputs(
    staging_BW: Tensor,
    turn: Tensor,
    words: Tensor,
    inputs: Mapping[str, Tensor],
    last_tokens: Tensor,
    tables_GSW: Tensor,
    block_size: int,
    pdl: bool = False,
) -> None:
    """Bring ``words`` up to date from the staging buffer whose ``turn`` it is.

    ``inputs`` are parts of the words:

    - ``token_ids``, ``positions`` [T], ``slots`` [cache groups, T or more] by token;
    - ``context_lens`` [S] by slot of the persistent batch, ``logit_rows`` [S] and ``params``
      [S, PARAMS] by row;
    - ``mode`` [1]: 0 to take all from the staging buffer, 1 to advance;
    - ``new_blocks`` [cache groups, S]: if advancing, what a row's table grows by, or -1;
    - ``patches`` [N, 2]: (place, block).

    In mode 0 they are copied: ``-1 - slot`` among the ids becomes what that slot of the persistent
    batch sampled last, and patches go to the tables, taken as flat (a negative place is none). In
    mode 1 the words are those of the step before, each of whose rows had one token and sampled.
    """
    first = {name: part.storage_offset() - words.storage_offset() for name, part in inputs.items()}
    _load_inputs_kernel[(triton.cdiv(words.shape[0], BLOCK),)](
        staging_BW,
        turn,
        words,
        last_tokens,
        tables_GSW,
        staging_BW.shape[1],
        words.shape[0],
        inputs["token_ids"].numel(),
        first["positions"],
        first["slots"],
        first["context_lens"],
        first["logit_rows"],
        first["params"],
        first["mode"],
        first["new_blocks"],
        first["patches"],
        first["patches"] + inputs["patches"].numel(),
        inputs["logit_rows"].numel(),
        inputs["slots"].stride(0),
        tables_GSW.stride(0),
        tables_GSW.stride(1),
        block_size,
        PARAMS=PARAMS,
        SLOT=SLOT,
        DRAW=DRAW,
        GROUPS=tables_GSW.shape[0],
        BLOCK=BLOCK,
        PDL=pdl,
        launch_pdl=pdl,
    )


@triton.jit(do_not_specialize=["size", "again"])
def _store_outputs_kernel(
    results_ptr,
    staging_ptr,
    turn_ptr,
    size,
    again,
    BUFFERS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    wait(PDL)
    turn = (tl.load(turn_ptr) + BUFFERS - again) % BUFFERS
    for start in tl.range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word = tl.load(results_ptr + at, mask=at < size, other=0)
        tl.store(staging_ptr + turn * size + at, word, mask=at < size)
    tl.debug_barrier()  # every thread has read whose turn it is
    tl.store(turn_ptr, (turn + 1) % BUFFERS)


def store_outputs(
    results: Tensor, staging_BW: Tensor, turn: Tensor, pdl: bool = False, *, again: bool = False
) -> None:
    """Copy ``results`` to the staging buffer whose ``turn`` it is, and let it be the next one's;
    or ``again`` to the one that has just had its turn."""
    _store_outputs_kernel[(1,)](
        results,
        staging_BW,
        turn,
        results.numel(),
        int(again),
        BUFFERS=staging_BW.shape[0],
        BLOCK=BLOCK,
        PDL=pdl,
        launch_pdl=pdl,
    )


@triton.jit(do_not_specialize=["num_words"])
def _load_masks_kernel(
    staging_ptr, masks_ptr, params_ptr, num_words,
    PARAMS: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    wait(PDL)
    mask = tl.load(params_ptr + tl.program_id(0) * PARAMS + MASK)
    if mask > 0:
        first = (mask - 1).to(tl.int64) * num_words
        for start in tl.range(0, num_words, BLOCK):
            at = start + tl.arange(0, BLOCK)
            word = tl.load(staging_ptr + first + at, mask=at < num_words, other=0)
            tl.store(masks_ptr + first + at, word, mask=at < num_words)


def load_masks(staging_RW: Tensor, masks_RW: Tensor, params: Tensor, pdl: bool = False) -> None:
    """Bring the masks that rows with these parameters name, counted from 1, from the staging
    buffer; 0 is none."""
    _load_masks_kernel[(params.shape[0],)](
        staging_RW,
        masks_RW,
        params,
        masks_RW.shape[1],
        PARAMS=PARAMS,
        MASK=MASK,
        BLOCK=2048,
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )
