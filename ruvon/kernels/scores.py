"""A row's scores, and passes over them: what `ruvon.kernels.sample` draws from.

Every pass keeps a sum (or maximum, or count) for each of ``BLOCK`` lanes and reduces once, at its
end. Lane ``i`` stands for tokens ``i``, ``i + BLOCK``, ``i + 2 BLOCK`` and so on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

IN_PROMPT = tl.constexpr(0x4000)  # a count's flag: the prompt holds this token
COUNT = tl.constexpr(0x3FFF)


@triton.jit
def load_scores(row, at, inside):
    """A row's scores after everything but temperature. ``row``: see `_sample_kernel`."""
    logits_ptr, counts_ptr, bias_ptr, mask_ptr, mask, history, bias, penalties = row
    repetition, presence, frequency = penalties
    z = tl.load(logits_ptr + at, mask=inside, other=float("-inf"))
    if mask > 0:
        word = tl.load(mask_ptr + (at >> 5), mask=inside, other=0)
        z = tl.where((word >> (at & 31)) & 1 != 0, z, float("-inf"))
    if bias >= 0:
        z += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if history >= 0:
        seen = tl.load(counts_ptr + at, mask=inside, other=0).to(tl.int32)
        count = (seen & COUNT).to(tl.float32)
        z = tl.where(seen != 0, tl.where(z > 0, z / repetition, z * repetition), z)
        z -= count * frequency + tl.where(count > 0, presence, 0.0)
    return z


@triton.jit
def finite(z):
    return tl.where(z == float("-inf"), 0.0, z)


@triton.jit
def survey(row, begin, V, rate, weighs, BLOCK: tl.constexpr):
    """The first pass, over tokens from ``begin`` up to V: the best score and the first token that
    has it, the lowest finite score, whether any is not a number, and by lane the mass relative to
    the best. Greedy rows (not ``weighs``) need no masses."""
    lanes = tl.arange(0, BLOCK)
    best_N = tl.full([BLOCK], float("-inf"), tl.float32)
    best_at_N = tl.zeros([BLOCK], tl.int32)
    lowest_N = tl.full([BLOCK], float("inf"), tl.float32)
    mass_N = tl.zeros([BLOCK], tl.float32)
    broken_N = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(begin, V, BLOCK):
        at = start + lanes
        z = load_scores(row, at, at < V)
        broken_N |= (z != z).to(tl.int32)
        new_N = tl.maximum(best_N, z)
        best_at_N = tl.where(z > best_N, at, best_at_N)
        if weighs:
            base = finite(new_N)
            mass_N = mass_N * tl.exp2((best_N - base) * rate) + tl.exp2((z - base) * rate)
            lowest_N = tl.minimum(lowest_N, tl.where(z > float("-inf"), z, float("inf")))
        best_N = new_N
    best = tl.max(best_N, axis=0)
    token = tl.min(tl.where(best_N == best, best_at_N, V), axis=0)
    mass_N *= tl.exp2((best_N - finite(best)) * rate)
    return best, token, tl.min(lowest_N, axis=0), tl.max(broken_N, axis=0), mass_N


@triton.jit
def mass_within(row, V, floor, pivot, top, rate, BLOCK: tl.constexpr):
    """By lane, the mass of scores of at least ``floor`` and more than ``pivot``."""
    lanes = tl.arange(0, BLOCK)
    mass_N = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK):
        at = start + lanes
        z = load_scores(row, at, at < V)
        within = (z >= floor) & (z > pivot)
        mass_N += tl.where(within, tl.exp2((z - top) * rate), 0.0)
    return mass_N


@triton.jit
def count_at_least(row, V, one, two, three, BLOCK: tl.constexpr):
    """How many scores reach each of three thresholds."""
    lanes = tl.arange(0, BLOCK)
    one_N = tl.zeros([BLOCK], tl.int32)
    two_N, three_N = one_N, one_N
    for start in tl.range(0, V, BLOCK):
        at = start + lanes
        z = load_scores(row, at, at < V)
        one_N += (z >= one).to(tl.int32)
        two_N += (z >= two).to(tl.int32)
        three_N += (z >= three).to(tl.int32)
    return tl.sum(one_N, axis=0), tl.sum(two_N, axis=0), tl.sum(three_N, axis=0)


@triton.jit
def kth_score(row, V, k, lowest, top, BLOCK: tl.constexpr):
    """A threshold that ``k`` scores reach (more, if some are equal to the k-th).

    Quarters an interval: at least k reach ``low``, fewer than k reach ``high``.
    """
    low = lowest
    high = top + tl.maximum(tl.abs(top), 1.0)
    searching = low < top
    while searching:
        step = (high - low) * 0.25
        one, two, three = low + step, low + 2 * step, low + 3 * step
        num_one, num_two, num_three = count_at_least(row, V, one, two, three, BLOCK)
        old_low, old_high = low, high
        high = tl.where(num_three < k, three, high)
        high = tl.where(num_two < k, two, high)
        high = tl.where(num_one < k, one, high)
        low = tl.where(num_one >= k, one, low)
        low = tl.where(num_two >= k, two, low)
        low = tl.where(num_three >= k, three, low)
        exact = (num_one == k) | (num_two == k) | (num_three == k)
        searching = ((low != old_low) | (high != old_high)) & (exact == 0)
    return low


@triton.jit
def norm_and_rank(logits_ptr, token, V, BLOCK: tl.constexpr):
    """The logarithm of the sum of a row's exponentials, and a token's rank, by the model."""
    lanes = tl.arange(0, BLOCK)
    chosen = tl.load(logits_ptr + token)
    top_N = tl.full([BLOCK], float("-inf"), tl.float32)
    weight_N = tl.zeros([BLOCK], tl.float32)
    ahead_N = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, V, BLOCK):
        at = start + lanes
        z = tl.load(logits_ptr + at, mask=at < V, other=float("-inf"))
        new_N = tl.maximum(top_N, z)
        base = finite(new_N)
        weight_N = weight_N * tl.exp(top_N - base) + tl.exp(z - base)
        ahead_N += (z > chosen).to(tl.int32)
        top_N = new_N
    highest = tl.max(top_N, axis=0)
    weight = tl.sum(weight_N * tl.exp(top_N - highest), axis=0)
    return highest + tl.log(weight), 1 + tl.sum(ahead_N, axis=0)


@triton.jit
def _score_kernel(
    logits_ptr, tokens_ptr, norms_ptr, ranks_ptr, V, logits_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    token = tl.maximum(tl.load(tokens_ptr + row), 0)
    norm, rank = norm_and_rank(logits_ptr + row.to(tl.int64) * logits_stride, token, V, BLOCK)
    tl.store(norms_ptr + row, norm)
    tl.store(ranks_ptr + row, rank)


def score(logits_LV: Tensor, tokens_L: Tensor) -> tuple[Tensor, Tensor]:
    """What to take from a row's logits to make log-probabilities of them, float32 [L], and its
    token's rank, int32 [L]. A row comes out the same to the last bit among any others."""
    rows, vocab = logits_LV.shape
    norms_L = torch.empty(rows, dtype=torch.float32, device=logits_LV.device)
    ranks_L = torch.empty(rows, dtype=torch.int32, device=logits_LV.device)
    block = min(4096, triton.next_power_of_2(vocab))
    _score_kernel[(rows,)](
        logits_LV, tokens_L, norms_L, ranks_L, vocab, logits_LV.stride(0), BLOCK=block, num_warps=8
    )  # fmt: skip
    return norms_L, ranks_L
