"""Parts of tensors: what a rank reads of a checkpoint, and no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ruvon.kernels.ops import Dense, Mxfp4, Quantized

Cut: TypeAlias = Sequence[Sequence[range] | None]
"""For each of a tensor's first dimensions, which places of it are wanted, in order; None: all. At
most one dimension has several ranges."""

WHOLE: Cut = ()


def is_whole(cut: Cut, shape: Sequence[int]) -> bool:
    """Whether nothing is left out of a tensor of that shape."""
    pairs = zip(cut, shape, strict=False)
    return all(ranges is None or [*ranges] == [range(size)] for ranges, size in pairs)


def take(values: Any, cut: Cut) -> Tensor:
    """The part of a tensor, or of whatever is indexed like one and gives tensors."""
    wanted = [(slice(None),) if ranges is None else [*map(_slice, ranges)] for ranges in cut]
    several = next((dim for dim, ranges in enumerate(wanted) if len(ranges) > 1), 0)
    parts = [values[place] for place in product(*wanted)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, several)


def _slice(places: range) -> slice:
    return slice(places.start, places.stop)


def take_columns(weight: Quantized | Mxfp4, columns: range) -> Tensor | Quantized | Mxfp4:
    """Some columns of a weight, exactly. Plain numbers where they are not whole groups."""
    group = 32 if isinstance(weight, Mxfp4) else weight.group
    if columns.start % group or columns.stop % group:
        return weight.dequantize()[:, columns.start : columns.stop]
    groups = slice(columns.start // group, columns.stop // group)
    if isinstance(weight, Mxfp4):
        return Mxfp4(weight.codes_NKB[:, groups], weight.scales_NK[:, groups])
    plain = _without_blocks(weight)
    return replace(
        plain,
        codes_NK=plain.codes_NK[:, columns.start : columns.stop],
        scales=plain.scales[:, groups],
        offsets=None if plain.offsets is None else plain.offsets[:, groups],
    )


def _without_blocks(weight: Quantized) -> Quantized:
    """The same with scales in float32, which no longer lie in blocks of eight groups. Codes of 5
    and 6 bits are as wide as 8 then: no kernel has them with such scales."""
    if weight.blocks is None:
        return weight
    scales, offsets = weight.tables()
    plain = replace(weight, scales=scales, offsets=offsets, blocks=None)
    if weight.bits == 4:
        return plain
    return replace(plain, codes_NK=weight.codes_NK - weight.zero, zero=0, bits=8)


def as_dense(values: Tensor | Quantized | Mxfp4) -> Dense | Quantized | Mxfp4:
    return Dense(values) if isinstance(values, Tensor) else values
