"""What the captured step's sampler does not do: typical_p, which sorts the vocabulary, and
bad_words, which look at several tokens. Such rows are sampled behind it, on the device too: nothing
here waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ruvon.engine.batch import to_device
from ruvon.engine.gpu.graphs import Words
from ruvon.kernels import sample, scores


@dataclass(frozen=True, slots=True)
class DeferredRow:
    """A row that the captured step has taken for padding."""

    row: int  # of the step's logits and results
    slot: int
    params: Words  # [PARAMS], as for the captured step
    typical_p: float
    banned_N2: Words  # (the token before, -1 for any; a token not to come after it)


NOTHING_BANNED: Words = np.zeros((0, 2), dtype=np.int32)


class BadWords:
    """A request's bad words, found by the tokens before their last two."""

    def __init__(self, words: Sequence[tuple[int, ...]]) -> None:
        ends: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for *before, last in words:
            previous = before.pop() if before else -1
            ends.setdefault(tuple(before), []).append((previous, last))
        self._ends = {before: np.array(pairs, dtype=np.int32) for before, pairs in ends.items()}
        self._lengths = sorted({len(before) for before in self._ends})

    def completed(self, history: Sequence[int], context: int) -> Words:
        """Pairs as in `DeferredRow.banned_N2`: which token would complete a word after the first
        ``context`` tokens. Of these the last may be missing from ``history``, for only the device
        knows it yet."""
        end = context - 1
        tails = [tuple(history[end - length : end]) for length in self._lengths if length <= end]
        found = [self._ends[tail] for tail in tails if tail in self._ends]
        pairs_N2: Words = np.concatenate([NOTHING_BANNED, *found])
        if len(history) < context:
            return pairs_N2
        pairs_N2 = pairs_N2[(pairs_N2[:, 0] == -1) | (pairs_N2[:, 0] == history[end])]
        pairs_N2[:, 0] = -1
        return pairs_N2


def sample_deferred(
    rows: Sequence[DeferredRow],
    logits_LV: Tensor,
    state: sample.SamplingState,
    results: Tensor,
    pdl: bool,
) -> None:
    """Sample these rows of a step, and put what comes of it among its results, int32 [3, L]."""
    device = logits_LV.device
    params_RP, typical_R, row_R, pairs_3N = upload(rows, device)
    own_RV = logits_LV[row_R]
    slot_R = params_RP[:, sample.SLOT].long()
    scores_RV = adjust(mask(own_RV, params_RP, state), params_RP, slot_R, state)
    row, before, last = pairs_3N
    hit = (before < 0) | (before == state.last_tokens[slot_R[row]])
    ruled_out = torch.where(hit, -torch.inf, 0.0)
    scores_RV.index_put_((row, last), ruled_out, accumulate=True)
    kept_RV = keep(scores_RV, params_RP, typical_R) | scores_RV.isnan() | scores_RV.isposinf()
    sampled = sample.make_sampled(len(rows), device)
    neutral_RP = neutral(params_RP)
    sample.sample(scores_RV.masked_fill_(~kept_RV, -torch.inf), neutral_RP, state, sampled, pdl)
    count(sampled.tokens, params_RP[:, sample.HISTORY] >= 0, slot_R, state)
    norm_R, rank_R = scores.score(own_RV, sampled.tokens)
    chosen_R = own_RV.gather(-1, sampled.tokens.clamp(min=0).long()[:, None])[:, 0]
    logprob_R = (chosen_R - norm_R).view(torch.int32)
    results[:, row_R] = torch.stack((sampled.tokens, logprob_R, rank_R))


def mask(own_RV: Tensor, params_RP: Tensor, state: sample.SamplingState) -> Tensor:
    """Scores with minus infinity for what a row's grammar rules out."""
    place_R = params_RP[:, sample.MASK].long()
    words_RW = state.masks[(place_R - 1).clamp(min=0)]
    bit_B = torch.arange(32, dtype=torch.int32, device=own_RV.device)
    bits_RV = (words_RW[:, :, None] >> bit_B & 1).flatten(1)[:, : own_RV.shape[1]]
    return own_RV.masked_fill((bits_RV == 0) & (place_R > 0)[:, None], -torch.inf)


def upload(
    rows: Sequence[DeferredRow], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the device needs of the rows: parameters, typical_p, places, and (row, before, last) of
    what is banned."""
    numbers = [len(row.banned_N2) for row in rows]
    banned_N3 = np.column_stack(
        (np.repeat(np.arange(len(rows)), numbers), np.concatenate([r.banned_N2 for r in rows]))
    )
    params, typical, places, banned = to_device(
        (
            np.stack([row.params for row in rows]),
            np.array([row.typical_p for row in rows], dtype=np.float32).view(np.int32),
            np.array([row.row for row in rows], dtype=np.int32),
            np.ascontiguousarray(banned_N3.T, dtype=np.int32),
        ),
        device,
    )
    params[:, sample.SLOT] = to_device(
        (np.array([row.slot for row in rows], dtype=np.int32),), device
    )[0]
    return params, typical.view(torch.float32), places.long(), banned.long()


def column(params_RP: Tensor, name: int) -> Tensor:
    """A parameter that is a float, [R, 1]."""
    return params_RP.view(torch.float32)[:, name, None]


def adjust(
    own_RV: Tensor, params_RP: Tensor, slot_R: Tensor, state: sample.SamplingState
) -> Tensor:
    """Biases and penalties, as the kernel's ``load_scores``."""
    biased_R1 = params_RP[:, sample.BIAS, None] >= 0
    scores_RV = own_RV + torch.where(biased_R1, state.bias[slot_R].float(), 0.0)
    penalized_R1 = params_RP[:, sample.HISTORY, None] >= 0
    seen_RV = torch.where(penalized_R1, state.counts[slot_R].int(), 0)
    number_RV = (seen_RV & scores.COUNT.value).float()
    repetition_R1 = column(params_RP, sample.REPETITION)
    penalized_RV = torch.where(scores_RV > 0, scores_RV / repetition_R1, scores_RV * repetition_R1)
    scores_RV = torch.where(seen_RV != 0, penalized_RV, scores_RV)
    presence_R1 = column(params_RP, sample.PRESENCE)
    scores_RV -= number_RV * column(params_RP, sample.FREQUENCY)
    return scores_RV - torch.where(number_RV > 0, presence_R1, 0.0)


def keep(scores_RV: Tensor, params_RP: Tensor, typical_R: Tensor) -> Tensor:
    """bool [R, V]: what top_k, min_p, top_p and typical_p leave, in this order; of greedy rows
    all."""
    temperature_R1 = column(params_RP, sample.TEMPERATURE)
    greedy_R1: Tensor = temperature_R1 < sample.COLDEST.value
    falling_RV, ids_RV = scores_RV.sort(dim=-1, descending=True, stable=True)
    weights_RV = (falling_RV - falling_RV[:, :1]) / torch.where(greedy_R1, 1.0, temperature_R1)
    weights_RV.exp_()
    place_V = torch.arange(scores_RV.shape[1], device=scores_RV.device)
    top_k_R1, top_p_R1 = params_RP[:, sample.TOP_K, None], column(params_RP, sample.TOP_P)
    kept_RV = (place_V < top_k_R1) | (top_k_R1 == 0)
    kept_RV &= weights_RV >= column(params_RP, sample.MIN_P)
    weights_RV *= kept_RV
    before_RV = weights_RV.cumsum(-1) - weights_RV
    kept_RV &= (before_RV < top_p_R1 * weights_RV.sum(-1, True)) | (top_p_R1 >= 1) | (place_V == 0)
    kept_RV &= typical(weights_RV * kept_RV, typical_R[:, None])
    by_id_RV: Tensor = torch.zeros_like(kept_RV).scatter_(-1, ids_RV, kept_RV)
    return by_id_RV | greedy_R1


def typical(weights_RV: Tensor, typical_R1: Tensor) -> Tensor:
    """bool [R, V]: those whose surprise is nearest to the expected, as
    `ruvon.engine.draw.typical`."""
    p_RV = weights_RV.double() / weights_RV.double().sum(-1, True)
    entropy_R1: Tensor = torch.special.entr(p_RV).sum(-1, True)
    distance_RV = (-p_RV.log() - entropy_R1).abs()
    near_RV, ids_RV = distance_RV.sort(dim=-1, stable=True)
    p_near_RV = p_RV.gather(-1, ids_RV)
    needed_RV = p_near_RV.cumsum(-1) - p_near_RV < typical_R1
    last_R1 = needed_RV.sum(-1, True) - 1
    return (distance_RV <= near_RV.gather(-1, last_R1.clamp(min=0))) | (typical_R1 >= 1)


def neutral(params_RP: Tensor) -> Tensor:
    """Parameters for scores in which all but the temperature has been done."""
    params_RP = params_RP.clone()
    floats_RP = params_RP.view(torch.float32)
    params_RP[:, sample.HISTORY] = params_RP[:, sample.BIAS] = -1
    params_RP[:, sample.TOP_K] = params_RP[:, sample.WANTS_LOGPROB] = 0
    params_RP[:, sample.MASK] = 0
    floats_RP[:, sample.TOP_P], floats_RP[:, sample.MIN_P] = 1.0, 0.0
    return params_RP


def count(
    token_R: Tensor, penalized_R: Tensor, slot_R: Tensor, state: sample.SamplingState
) -> None:
    """Count what was sampled, where there are penalties."""
    place = (slot_R, token_R.clamp(min=0).long())
    seen_R = state.counts[place]
    full_R = (seen_R & scores.COUNT.value) == scores.COUNT.value
    state.counts[place] = seen_R + ((token_R >= 0) & penalized_R & ~full_R)
