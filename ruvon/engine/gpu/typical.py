"""typical_p, which sorts the vocabulary, and is all that the captured step's sampler leaves out: a
row that wants it is given a mask of what it keeps. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ruvon.engine.batch import ints, to_device
from ruvon.engine.types import SamplingRow
from ruvon.kernels import sample, scores


def narrow_masks(
    rows: Mapping[int, SamplingRow],
    staged_RW: Tensor,
    logits_LV: Tensor,
    params_LP: Tensor,
    state: sample.SamplingState,
) -> None:
    """Take out of the staged masks of a step's ``rows``, which are known by their places, what
    typical_p and the filters before it do not keep. The host has filled the masks; who samples next
    on the stream loads them."""
    wanted = [(i, place) for i, place in enumerate(rows) if is_typical(rows[place])]
    if not wanted:
        return
    samplings = [rows[place].sampling for _, place in wanted]
    filters = np.array([(s.top_k, s.min_p, s.top_p, s.typical_p) for s in samplings], np.float32)
    masks, places = zip(*wanted, strict=True)
    words_RW, places_R, filters_R4 = to_device(
        (staged_RW.numpy()[[*masks]], ints([*places]), filters.view(np.int32)), logits_LV.device
    )
    own_RV, params_RP = logits_LV[places_R.long()], params_LP[places_R.long()]
    allowed_RV = unpack(words_RW, own_RV.shape[1])
    scores_RV = adjust(own_RV.masked_fill(~allowed_RV, -torch.inf), params_RP, state)
    kept_RV = keep(scores_RV, column(params_RP, sample.TEMPERATURE), filters_R4.view(torch.float32))
    broken_RV = scores_RV.isnan() | scores_RV.isposinf()  # for the sampler to find
    for i, kept_W in zip(masks, pack(allowed_RV & (kept_RV | broken_RV)), strict=True):
        staged_RW[i].copy_(kept_W, non_blocking=True)


def is_typical(row: SamplingRow) -> bool:
    return row.sampling.typical_p < 1


def unpack(words_RW: Tensor, vocab: int) -> Tensor:
    """bool [R, V]: the bits of masks."""
    bit_B = torch.arange(32, dtype=torch.int32, device=words_RW.device)
    return (words_RW[:, :, None] >> bit_B & 1).flatten(1)[:, :vocab] != 0


def pack(kept_RV: Tensor) -> Tensor:
    """int32 [R, W]: masks of these bits."""
    bit_B = torch.arange(32, dtype=torch.int32, device=kept_RV.device)
    padded_RV = torch.nn.functional.pad(kept_RV.int(), (0, -kept_RV.shape[1] % 32))
    return (padded_RV.view(len(kept_RV), -1, 32) << bit_B).sum(-1, dtype=torch.int32)


def column(params_RP: Tensor, name: int) -> Tensor:
    """A parameter that is a float, [R, 1]."""
    return params_RP.view(torch.float32)[:, name, None]


def adjust(own_RV: Tensor, params_RP: Tensor, state: sample.SamplingState) -> Tensor:
    """Biases and penalties, as the kernel's ``load_scores``."""
    slot_R = params_RP[:, sample.SLOT].long()
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


def keep(scores_RV: Tensor, temperature_R1: Tensor, filters_R4: Tensor) -> Tensor:
    """bool [R, V]: what top_k, min_p, top_p and typical_p leave, in this order; of greedy rows
    all."""
    top_k_R1, min_p_R1, top_p_R1, typical_p_R1 = torch.split(filters_R4, 1, dim=1)
    greedy_R1: Tensor = temperature_R1 < sample.COLDEST.value
    falling_RV, ids_RV = scores_RV.sort(dim=-1, descending=True, stable=True)
    weights_RV = (falling_RV - falling_RV[:, :1]) / torch.where(greedy_R1, 1.0, temperature_R1)
    weights_RV.exp_()
    place_V = torch.arange(scores_RV.shape[1], device=scores_RV.device)
    kept_RV = (place_V < top_k_R1) | (top_k_R1 == 0)
    kept_RV &= weights_RV >= min_p_R1
    weights_RV *= kept_RV
    before_RV = weights_RV.cumsum(-1) - weights_RV
    kept_RV &= (before_RV < top_p_R1 * weights_RV.sum(-1, True)) | (top_p_R1 >= 1) | (place_V == 0)
    kept_RV &= typical(weights_RV * kept_RV, typical_p_R1)
    by_id_RV: Tensor = torch.zeros_like(kept_RV).scatter_(-1, ids_RV, kept_RV)
    return by_id_RV | greedy_R1


def typical(weights_RV: Tensor, typical_p_R1: Tensor) -> Tensor:
    """bool [R, V]: those whose surprise is nearest to the expected, as
    `ruvon.engine.draw.typical`."""
    p_RV = weights_RV.double() / weights_RV.double().sum(-1, True)
    entropy_R1: Tensor = torch.special.entr(p_RV).sum(-1, True)
    distance_RV = (-p_RV.log() - entropy_R1).abs()
    near_RV, ids_RV = distance_RV.sort(dim=-1, stable=True)
    p_near_RV = p_RV.gather(-1, ids_RV)
    needed_RV = p_near_RV.cumsum(-1) - p_near_RV < typical_p_R1
    last_R1 = needed_RV.sum(-1, True) - 1
    return distance_RV <= near_RV.gather(-1, last_R1.clamp(min=0))
