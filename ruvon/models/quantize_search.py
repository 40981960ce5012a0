"""Four-bit codes, each group's scale and offset chosen for the least squared error.

Rounding to 16 steps between a group's least and greatest value spends the steps on two outliers.
Here a number of ranges are tried. Each gives codes; for codes, the best scale and offset are a
straight line fitted by least squares, and what error that leaves has a closed form, so a range is
judged without storing anything. The best one's line is rounded to float16, the codes are chosen
again for the rounded line, and the line once more for those codes: what is compared is what will
be stored, and rounding to nearest is among it, so that no group comes out worse than by that.

Ranges that cut off the ends serve weights that lie anywhere. Ranges that span fewer than 16 steps
serve weights that have been on a grid before and do not use all of it, as those of Q4_0.

Shapes: J the 32 values of a group, M groups. Groups lie side by side, so that a sum over J adds
whole vectors; its order is fixed, and a group's result does not depend on others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 15  # from the lowest code to the highest
AT_ONCE = 4096  # groups; half a megabyte of float32, so that all passes but one read the cache
AT_ONCE_ON_GPU = 1 << 18  # which launches take longer than the work with fewer
CUTS = (0.0, 0.03, 0.06)  # shares of the range cut off at an end
ROUNDS = 2  # of a line fitted to codes and codes chosen for the line
RANGES = (  # where code 0 lies and how far the next is, as shares of the group's range
    *((low, (1 - low - high) / STEPS) for low in CUTS for high in CUTS),
    *((0.0, 1 / steps) for steps in range(7, STEPS)),
)


@dataclass(frozen=True, slots=True)
class Grids:
    """``value = code * scale + offset`` for M groups."""

    codes_JM: Tensor  # float32, whole numbers from 0 to 15
    scales_M: Tensor  # float32 that float16 can hold; so are the offsets
    offsets_M: Tensor
    error_M: Tensor  # sum of squares


def search_grids(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 ``[M, J]`` → codes (int8 ``[M, J]``), scales and offsets (float16 ``[M]``)."""
    codes = torch.empty(groups.shape, dtype=torch.int8, device=groups.device)
    scales, offsets = groups.new_empty(2, len(groups), dtype=torch.float16)
    at_once = AT_ONCE if groups.device.type == "cpu" else AT_ONCE_ON_GPU
    for start in range(0, len(groups), at_once):
        part = slice(start, start + at_once)
        best = _best_grids(groups[part].t().contiguous())
        codes[part], scales[part], offsets[part] = best.codes_JM.t(), best.scales_M, best.offsets_M
    return codes, scales, offsets


def _best_grids(values_JM: Tensor) -> Grids:
    least, greatest = values_JM.aminmax(dim=0)
    best = _stored(values_JM, (greatest - least) / STEPS, least)
    mean = values_JM.mean(0)
    # Products of codes and values lose less in float32 if the values are around zero.
    centred = values_JM - mean
    scale, offset = _best_line(centred, least - mean, greatest - least)
    for _ in range(ROUNDS):
        candidate = _stored(values_JM, scale, offset + mean)
        best = _better(best, candidate)
        scale, offset, _ = _fit(centred, candidate.codes_JM)
    return _better(best, _stored(values_JM, scale, offset + mean))


def _best_line(centred_JM: Tensor, least_M: Tensor, range_M: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and offsets fitted to the codes of the best of `RANGES`."""
    best = torch.zeros_like(least_M), torch.zeros_like(least_M), torch.full_like(least_M, -1.0)
    for start, step in RANGES:
        codes = _codes(centred_JM, range_M * step, least_M + range_M * start)
        line = _fit(centred_JM, codes)
        better = line[2] > best[2]
        scale, offset, gain = (torch.where(better, a, b) for a, b in zip(line, best, strict=True))
        best = scale, offset, gain
    return best[:2]


def _fit(centred_JM: Tensor, codes_JM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The least squares scale and offset for these codes, and by how much they lower the sum of
    squares. Codes that are all the same fit nothing: scale 0, the mean as offset."""
    mean = codes_JM.mean(0)
    # A difference of large numbers, yet exact: whole numbers under 2^18, in units of 1 / J.
    variance = (codes_JM * codes_JM).sum(0) - len(codes_JM) * mean * mean
    covariance = (codes_JM * centred_JM).sum(0)
    scale = torch.where(variance > 0, covariance / variance, 0.0)
    return scale, -scale * mean, scale * covariance


def _stored(values_JM: Tensor, scale_M: Tensor, offset_M: Tensor) -> Grids:
    """Round the line to float16 first, so that the codes make up for that."""
    scale, offset = scale_M.half().float(), offset_M.half().float()
    codes = _codes(values_JM, scale, offset)
    missed = (codes * scale).add_(offset).sub_(values_JM)
    return Grids(codes, scale, offset, missed.square_().sum(0))


def _codes(values_JM: Tensor, scale_M: Tensor, offset_M: Tensor) -> Tensor:
    """The nearest of 16 steps; 0 where there is no step."""
    inverse = torch.where(scale_M > 0, 1 / scale_M, 0.0)
    return (values_JM - offset_M).mul_(inverse).round_().clamp_(0, STEPS)


def _better(a: Grids, b: Grids) -> Grids:
    """Group by group; ``a`` where both are as good."""
    first = a.error_M <= b.error_M
    return Grids(
        torch.where(first, a.codes_JM, b.codes_JM),
        torch.where(first, a.scales_M, b.scales_M),
        torch.where(first, a.offsets_M, b.offsets_M),
        torch.where(first, a.error_M, b.error_M),
    )
