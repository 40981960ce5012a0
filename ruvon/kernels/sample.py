"""Sampling on the device, so that the next step can start before the host has seen them.

One program samples for one row, in a few passes over its scores (`ruvon.kernels.scores`), and sorts
nothing:

- A draw turns one uniform number into a token by inverting the cumulative distribution, first over
  lanes, then within the lane.
- top_k finds its threshold by narrowing an interval of scores; min_p's is known from the maximum.
- top_p draws from what is left and accepts the token if everything likelier weighs less than p, or
  nothing. Otherwise that token and all less likely ones are outside the nucleus, and it draws again
  from the rest: the accepted token is distributed as if the nucleus had been cut out first.

The order of transforms is `ruvon.engine.sampler`'s. Uniform numbers come from Philox, keyed by the
row's seed and counted by its draw, so a row draws the same alone or in any batch. The draws are not
those of the CPU's sampler, which inverts in another order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.pdl import release, wait
from ruvon.kernels.scores import COUNT, kth_score, load_scores, mass_within, norm_and_rank, survey

PARAMS = 16  # int32 or float32 words of one row's parameters
# The words, in order; floats are stored by their bits.
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6)
TOP_K, SEED_LOW, SEED_HIGH, DRAW, HISTORY, BIAS, WANTS_LOGPROB, SLOT, MASK = range(6, 15)

NOT_A_NUMBER, INFINITE, NOTHING_LEFT = -1, -2, -3  # in place of a token

COLDEST = tl.constexpr(2.0**-120)  # what is colder is greedy: its inverse is no float32
SPLITS, PROGRAMS = 32, 132  # programs of a row at most, and of all of them about
ATTEMPTS = tl.constexpr(64)  # at top_p; each about halves what is left outside of the nucleus


class SamplingState(NamedTuple):
    """What outlives a step, by *slot* (a sequence's place in the persistent batch)."""

    last_tokens: Tensor  # int32 [slots]: what each sequence sampled last
    counts: Tensor  # int16 [slots, V]: how often its output holds a token, and `IN_PROMPT`
    bias: Tensor  # float16 [slots, V]: added to its scores; minus infinity rules a token out
    masks: Tensor  # int32 [slots, V / 32]: a bit a token; not by slot, but as MASK says
    partial: Tensor  # int32 [slots, 3, SPLITS]: of programs that share a row
    counters: Tensor  # int32 [slots], zero between launches


class Sampled(NamedTuple):
    """A step's results, one for each row."""

    tokens: Tensor  # int32 [L], or why there is none
    logprobs: Tensor  # float32 [L], where wanted: of the model, before all transforms
    ranks: Tensor  # int32 [L], where wanted: 1 is the likeliest


@triton.jit
def first_above(cumulative_N, mass_N, target, places_N):
    """The first place where the running sum exceeds ``target``; rounding must not pick one of no
    mass, so past the end it is the last place that has any."""
    place = tl.sum((cumulative_N <= target).to(tl.int32), axis=0)
    last = tl.max(tl.where(mass_N > 0.0, places_N, 0), axis=0)
    return tl.minimum(place, last)


@triton.jit
def share(top, token, broken, partial_ptr, counter_ptr, split, splits, SPLITS: tl.constexpr):
    """(what the programs of a greedy row have found, whether this one came last and goes on)."""
    at = partial_ptr + split
    tl.store(at, top.to(tl.int32, bitcast=True))
    tl.store(at + SPLITS, token)
    tl.store(at + 2 * SPLITS, broken)
    tl.debug_barrier()  # every thread's part is written before one thread says so
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == splits - 1
    if last:
        tl.store(counter_ptr, 0)
        others = tl.arange(0, SPLITS)
        all_at, there = partial_ptr + others, others < splits
        tops = tl.load(all_at, mask=there, other=0, cache_modifier=".cg")
        tops = tl.where(there, tops.to(tl.float32, bitcast=True), float("-inf"))
        tokens = tl.load(all_at + SPLITS, mask=there, other=0, cache_modifier=".cg")
        flags = tl.load(all_at + 2 * SPLITS, mask=there, other=0, cache_modifier=".cg")
        top = tl.max(tops, axis=0)
        token = tl.min(tl.where((tops == top) & there, tokens, 2147483647), axis=0)
        broken = tl.max(flags, axis=0)
    return top, token, broken, last


@triton.jit(do_not_specialize=["masked", "per_split"])
def _sample_kernel(
    logits_ptr,
    ints_ptr,
    floats_ptr,
    last_tokens_ptr,
    counts_ptr,
    bias_ptr,
    masks_ptr,
    partial_ptr,
    counters_ptr,
    tokens_ptr,
    logprobs_ptr,
    ranks_ptr,
    V,
    logits_stride,
    masked,
    per_split,  # tokens of one program of a greedy row; the first of another's has all
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    release(PDL)
    index, split = tl.program_id(0), tl.program_id(1)
    ints, floats = ints_ptr + index * PARAMS, floats_ptr + index * PARAMS
    lanes, columns = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    wait(PDL)
    temperature, top_p, min_p = tl.load(floats), tl.load(floats + 1), tl.load(floats + 2)
    top_k, history = tl.load(ints + 6), tl.load(ints + 10)
    slot, mask = tl.load(ints + 13).to(tl.int64), tl.load(ints + 14)
    ours = (mask > 0) == (masked > 0)
    slot = tl.where(ours, slot, -1)
    logits_row = logits_ptr + index.to(tl.int64) * logits_stride
    row = (
        logits_row,
        counts_ptr + slot * V,
        bias_ptr + slot * V,
        masks_ptr + (mask - 1).to(tl.int64) * tl.cdiv(V, 32),
        mask,
        history,
        tl.load(ints + 11),
        (tl.load(floats + 3), tl.load(floats + 4), tl.load(floats + 5)),
    )
    V = tl.where(slot >= 0, V, 0)  # padding, and who is not ours, have nothing to look at
    warm = temperature >= COLDEST
    rate = 1.4426950408889634 / tl.where(warm, temperature, 1.0)
    alone = warm | (tl.num_programs(1) == 1)
    ours &= (split == 0) | (alone == 0)
    begin = tl.where(alone, 0, split * per_split)
    end = tl.where(ours, tl.where(alone, V, tl.minimum(begin + per_split, V)), 0)
    top, token, lowest, broken, mass_N = survey(row, begin, end, rate, warm, BLOCK)
    if ours & (alone == 0):
        top, token, broken, ours = share(
            top, token, broken, partial_ptr + index * 3 * SPLITS, counters_ptr + index,
            split, tl.num_programs(1), SPLITS,
        )  # fmt: skip
    slot = tl.where(ours, slot, -1)

    if ours & warm & (top_p > 0.0) & (top < float("inf")) & (top > float("-inf")):
        floor = tl.where(min_p > 0.0, top + tl.log2(tl.maximum(min_p, 1e-30)) / rate, float("-inf"))
        if (top_k > 0) & (top_k < V):
            floor = tl.maximum(floor, kth_score(row, V, top_k, lowest, top, BLOCK))
        pivot = tl.full([], float("-inf"), tl.float32)
        if floor > float("-inf"):
            mass_N = mass_within(row, V, floor, pivot, top, rate, BLOCK)
        kept = tl.sum(mass_N, axis=0)
        low_seed = tl.load(ints + 7).to(tl.uint32, bitcast=True).to(tl.uint64)
        high_seed = tl.load(ints + 8).to(tl.uint32, bitcast=True).to(tl.uint64)
        draw = tl.load(ints + 9)
        zero = draw * 0  # on the device, so that the loop may carry it
        attempt = zero
        likeliest = token
        drawing = zero == 0
        while drawing:
            random, _, _, _ = tl.philox((high_seed << 32) | low_seed, draw, attempt, zero, zero)
            target = tl.uint_to_uniform_float(random) * tl.sum(mass_N, axis=0)
            lane = first_above(tl.cumsum(mass_N, axis=0), mass_N, target, lanes)
            before = tl.sum(tl.where(lanes < lane, mass_N, 0.0), axis=0)
            tokens = lane + BLOCK * columns
            z = load_scores(row, tokens, tokens < V)
            within = (z >= floor) & (z > pivot)
            mass = tl.where(within, tl.exp2((z - top) * rate), 0.0)
            column = first_above(tl.cumsum(mass, axis=0), mass, target - before, columns)
            token = lane + BLOCK * column
            drawing = top_p < 1.0
            if drawing:
                pivot = tl.max(tl.where(columns == column, z, float("-inf")), axis=0)
                mass_N = mass_within(row, V, floor, pivot, top, rate, BLOCK)
                likelier = tl.sum(mass_N, axis=0)
                drawing = (likelier >= top_p * kept) & (likelier > 0.0)
            attempt += 1
            if attempt == ATTEMPTS:  # of a nucleus that small this is nearly always the one
                token = tl.where(drawing, likeliest, token)
                drawing = zero != 0

    token = tl.where(top == float("-inf"), -3, token)
    token = tl.where(top == float("inf"), -2, token)
    token = tl.where(broken > 0, -1, token)
    if ours & (tl.load(ints + 12) > 0) & (token >= 0):
        norm, rank = norm_and_rank(logits_row, token, V, BLOCK)
        tl.store(logprobs_ptr + index, tl.load(logits_row + token) - norm)
        tl.store(ranks_ptr + index, rank)
    tl.store(tokens_ptr + index, token, mask=ours)
    if slot >= 0:
        tl.store(last_tokens_ptr + slot, tl.maximum(token, 0))
        if (history >= 0) & (token >= 0):
            place = counts_ptr + slot * V + token
            seen = tl.load(place)
            tl.store(place, seen + tl.where((seen & COUNT) < COUNT, 1, 0).to(tl.int16))


def make_state(slots: int, vocab_size: int, device: torch.device) -> SamplingState:
    return SamplingState(
        torch.zeros(slots, dtype=torch.int32, device=device),
        torch.zeros(slots, vocab_size, dtype=torch.int16, device=device),
        torch.zeros(slots, vocab_size, dtype=torch.float16, device=device),
        torch.zeros(slots, triton.cdiv(vocab_size, 32), dtype=torch.int32, device=device),
        torch.zeros(slots, 3, SPLITS, dtype=torch.int32, device=device),
        torch.zeros(slots, dtype=torch.int32, device=device),
    )


def make_sampled(rows: int, device: torch.device) -> Sampled:
    return Sampled(
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.zeros(rows, dtype=torch.float32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
    )


def sample(
    logits_LV: Tensor,
    params: Tensor,
    state: SamplingState,
    sampled: Sampled,
    pdl: bool = False,
    *,
    masked: bool = False,
) -> None:
    """Sample a token for each row of ``logits_LV``, float32, which stays as it is: for those that
    have a mask, or for those that have none.

    ``params``: int32 [L, PARAMS]. HISTORY and BIAS are -1 where a row has no penalties or biases,
    SLOT is -1 for padding, MASK is 0 without a mask, or 1 and more for a row of ``state.masks``.
    Fills ``sampled`` and the slots' ``last_tokens`` and ``counts``.
    """
    rows, vocab = logits_LV.shape
    block = min(4096, triton.next_power_of_2(vocab))
    blocks = triton.cdiv(vocab, block)
    per_split = triton.cdiv(blocks, max(1, min(SPLITS, PROGRAMS // rows))) * block
    _sample_kernel[(rows, triton.cdiv(vocab, per_split))](
        logits_LV,
        params,
        params.view(torch.float32),
        state.last_tokens,
        state.counts,
        state.bias,
        state.masks,
        state.partial,
        state.counters,
        sampled.tokens,
        sampled.logprobs,
        sampled.ranks,
        vocab,
        logits_LV.stride(0),
        int(masked),
        per_split,
        BLOCK=block,
        SPLITS=SPLITS,
        COLUMNS=triton.next_power_of_2(triton.cdiv(vocab, block)),
        PARAMS=PARAMS,
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )
