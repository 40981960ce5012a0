"""Quantization at load: each scheme says what becomes of a weight before it is packed.

Only matrices are quantized: projections, and the embedding table and head, whose rows are looked
up or scored one by one and suffer more, so they get eight bits even under int4. Norms, biases and
learned positions stay as they are.

A mixture's experts are matrices like others, but MXFP4 is four bits already and what its model was
trained in: int8 and int4 leave it alone. Its router stays as it is.

Four bits are few enough that scale and offset are worth a search: `quantize_search`.

A new format is a row in `SCHEMES` here and a layout in the tables of kernels that pack it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ruvon.errors import LoadError
from ruvon.kernels.ops import Dense, Mxfp4, Quantized, Stacked, Weight
from ruvon.models.quantize_search import search_grids

UNIT = 32  # rows that kernels compute together
GROUP = 32  # weights that share a scale; the same as Q8_0 and Q4_1


@dataclass(frozen=True, slots=True)
class Scheme:
    """What is done to projections, to tables (embedding and head), and to experts."""

    projection: Callable[[Weight], Weight]
    table: Callable[[Weight], Weight]
    experts: Callable[[Weight], Weight]


def keep(weight: Weight) -> Weight:
    """The checkpoint's own format."""
    return weight


def dequantize(weight: Weight) -> Dense:
    """Plain numbers: float32 where the checkpoint is quantized, else its own type."""
    return weight if isinstance(weight, Dense) else Dense(weight.dequantize())


def to_int8(weight: Weight) -> Quantized:
    """Symmetric: code = round(w / scale), the group's largest magnitude at ±127."""
    values = _groups(weight)
    scales = (values.abs().amax(-1, keepdim=True) / 127).half()
    return _quantized(_divide(values, scales).round().clamp(-127, 127), scales, None, 8)


def to_int4(weight: Weight) -> Quantized:
    """With an offset: codes 0 to 15, scale and offset searched for the least squared error.

    A weight that is in this form already stays as it is: nothing found could be nearer.
    """
    if isinstance(weight, Quantized) and _is_int4(weight):
        return weight
    values = _groups(weight)
    codes, scales, offsets = search_grids(values.flatten(0, 1))
    return _quantized(
        codes.view_as(values),
        scales.view(*values.shape[:2], 1),
        offsets.view(*values.shape[:2], 1),
        4,
    )


def but_mxfp4(change: Callable[[Weight], Weight]) -> Callable[[Weight], Weight]:
    """Leaves what is in MXFP4 as it is."""
    return lambda weight: weight if isinstance(weight, Mxfp4) else change(weight)


SCHEMES: Mapping[str, Scheme] = {
    "auto": Scheme(keep, keep, keep),
    "none": Scheme(dequantize, dequantize, dequantize),
    "int8": Scheme(to_int8, to_int8, but_mxfp4(to_int8)),
    "int4": Scheme(to_int4, to_int8, but_mxfp4(to_int4)),
}


def _is_int4(weight: Quantized) -> bool:
    return weight.bits == 4 and weight.group == GROUP and weight.scales.dtype == torch.float16


def _groups(weight: Weight) -> Tensor:
    """float32 [N, K / GROUP, GROUP]."""
    values = dequantize(weight).weight_NK.float()
    n, k = values.shape
    if k % GROUP:
        raise LoadError(f"cannot quantize: {k} columns are no multiple of {GROUP}")
    return values.view(n, k // GROUP, GROUP)


def _divide(values: Tensor, scales: Tensor) -> Tensor:
    """By the scale as it is stored, so its rounding is made up for; an empty group gives zeros."""
    wide = scales.float()
    return torch.where(wide == 0, 0.0, values / wide)


def _quantized(codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int) -> Quantized:
    return Quantized(
        codes_NK=codes.to(torch.int8).flatten(1),
        scales=scales.squeeze(-1),
        offsets=None if offsets is None else offsets.squeeze(-1),
        group=GROUP,
        bits=8 if bits == 8 else 4,
    )


def stack(parts: Sequence[Weight]) -> Weight:
    """Weights of equal K, one above the other (q over k over v), without losing a bit.

    Files mix formats (a Q4_K_M has its v in Q6_K), and then each part keeps its own, if its rows
    fill whole units of the kernels. If not, or if one is not quantized, the whole becomes plain
    numbers.
    """
    if len(parts) == 1:
        return parts[0]
    if packed := _of(Mxfp4, parts):
        codes, scales = ([p.codes_NKB for p in packed], [p.scales_NK for p in packed])
        return Mxfp4(torch.cat(codes), torch.cat(scales))
    quantized = _of(Quantized, parts)
    aligned = all(part.codes_NK.shape[0] % UNIT == 0 for part in quantized[:-1])
    if not quantized or not (aligned or all(map(quantized[0].is_like, quantized))):
        plain = [dequantize(part).weight_NK for part in parts]
        dtype = torch.float32 if len({p.dtype for p in plain}) > 1 else plain[0].dtype
        return Dense(torch.cat([p.to(dtype) for p in plain]))
    runs: list[list[Quantized]] = []
    for part in quantized:
        if runs and runs[-1][0].is_like(part):
            runs[-1].append(part)
        else:
            runs.append([part])
    joined = tuple(map(_join, runs))
    return joined[0] if len(joined) == 1 else Stacked(joined)


W = TypeVar("W", Quantized, Mxfp4)


def _of(kind: type[W], parts: Sequence[Weight]) -> list[W]:
    """The parts, if all of them are of this kind."""
    found = [part for part in parts if isinstance(part, kind)]
    return found if len(found) == len(parts) else []


def _join(parts: Sequence[Quantized]) -> Quantized:
    """Those of one format."""

    def all_of(tensors: list[Tensor | None]) -> Tensor | None:
        there = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(there) if there else None

    return replace(
        parts[0],
        codes_NK=torch.cat([part.codes_NK for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        offsets=all_of([part.offsets for part in parts]),
        blocks=all_of([part.blocks for part in parts]),
    )


def split(weight: Weight, count: int) -> list[Weight]:
    """The other way: so many weights of equal N, which share the memory of the whole."""
    match weight:
        case Dense(values):
            return [Dense(part) for part in values.chunk(count)]
        case Mxfp4(codes, scales):
            pairs = zip(codes.chunk(count), scales.chunk(count), strict=True)
            return [Mxfp4(*pair) for pair in pairs]
        case Quantized():
            rows = weight.codes_NK.shape[0] // count
            return [take_rows(weight, slice(i * rows, (i + 1) * rows)) for i in range(count)]
        case Stacked():
            return split(dequantize(weight), count)


def take_rows(weight: Quantized, rows: Tensor | slice) -> Quantized:
    """Some rows of a weight, in this order."""
    return replace(
        weight,
        codes_NK=weight.codes_NK[rows],
        scales=weight.scales[rows],
        offsets=None if weight.offsets is None else weight.offsets[rows],
        blocks=None if weight.blocks is None else weight.blocks[rows],
    )
