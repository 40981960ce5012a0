"""A layer's experts on their way into a model, from any of the forms that checkpoints have them in.

All experts of a layer as one tensor (E×N×K, or E×K×N for what was written to be multiplied from the
left), with gates and what they gate in two halves, in turns, or in two tensors; or each expert by
itself, in tensors of its own. MXFP4 comes as blocks of codes and their scales. Whatever it is, it
becomes what `Experts` says: an expert's rows together, those of its gate first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ruvon.errors import LoadError
from ruvon.kernels.ops import Dense, Experts, ExpertsSpec, Mxfp4, PackedExperts, Quantized, Weight
from ruvon.models.cuts import Cut
from ruvon.models.quantize import keep, split, stack
from ruvon.models.weights import Rule, Weights


def load_experts(
    weights: Weights, spec: ExpertsSpec, hidden: int, layer: int, *, bias: bool
) -> PackedExperts:
    """A layer's experts, under the rules ``experts_up`` and ``experts_down``, packed. Ranks share
    the width of each: a rank's experts are as many, and narrower."""
    pack, local = weights.ops.pack_experts, weights.share.local.experts
    assert pack is not None, "a backend without experts was refused before"
    assert local is not None
    count = spec.num_experts
    up = Part(weights, "experts_up", (spec.width, hidden), count, layer, halves=2)
    down = Part(weights, "experts_down", (hidden, spec.width), count, layer)
    experts = Experts(
        up=_weight(up),
        up_bias_N=_bias(up) if bias else None,
        down=_weight(down),
        down_bias_N=_bias(down) if bias else None,
    )
    try:
        return pack(experts, local)
    except LoadError as error:
        raise LoadError(f"{weights.source.path}: experts of layer {layer}: {error}") from None


@dataclass(frozen=True, slots=True)
class Part:
    """One of the two matrices of all experts of a layer."""

    weights: Weights
    key: str
    shape: tuple[int, int]  # of an expert's, or of each of its two halves
    count: int  # of experts
    layer: int
    halves: int = 1  # 2: gates, and what they gate

    @property
    def rule(self) -> Rule:
        return self.weights.rules[self.key]

    @property
    def size(self) -> tuple[int, int, int]:
        """Of all experts, halves as one."""
        return self.count, self.halves * self.shape[0], self.shape[1]

    @property
    def names(self) -> list[str]:
        stored = self.rule.gguf if self.weights.is_gguf else self.rule.hugging_face
        return [name.format(i=self.layer) for name in stored]

    def ending(self, kind: str) -> str:
        return self.weights.ending(self.key, kind)

    def rows(self, halves: int) -> Sequence[range]:
        """Which rows of an expert are this rank's, of a matrix that holds so many halves."""
        size = self.shape[0]
        mine = self.weights.share.part(self.rule.rows, size)
        if halves == 1:
            return (mine,)
        if self.rule.interleaved:
            return (range(2 * mine.start, 2 * mine.stop),)
        return mine, range(size + mine.start, size + mine.stop)

    def columns(self, each: int = 1) -> Sequence[range]:
        """Which of its columns, ``each`` of which are one number's."""
        mine = self.weights.share.part(self.rule.columns, self.shape[1])
        return (range(mine.start // each, mine.stop // each),)


def _weight(part: Part) -> Weight:
    """[count * halves * rows, columns], changed as the scheme has it."""
    weights, rule, change = part.weights, part.rule, part.weights.scheme.experts
    rows, columns = part.rows(part.halves), part.columns()
    if weights.is_gguf:
        cut, size = (None, part.rows(1), columns), (part.count, *part.shape)
        tables = [weights.read(name + ".weight", size, cut) for name in part.names]
        return _changed([_as_weight(table) for table in tables], part.count, change)
    (name,) = part.names
    if weights.has(name + part.ending("blocks")):
        return _changed([_mxfp4(part, name)], part.count, change)
    whole = name + part.ending("weight")
    if rule.each and not weights.has(whole):
        return stack(list(_one_by_one(part)))
    count, outputs, inputs = part.size
    if rule.transposed:
        cut = (None, columns, rows)
        values = _tensor(weights, whole, (count, inputs, outputs), cut).transpose(1, 2)
    else:
        values = _tensor(weights, whole, part.size, (None, rows, columns))
    return _changed([Dense(_ordered(rule, values))], count, change)


def _one_by_one(part: Part) -> Iterator[Weight]:
    """Each expert by itself; its gate stands before what it gates, by the rule."""
    cut = part.rows(1), part.columns()
    for e in range(part.count):
        for name in part.rule.each:
            full = name.format(i=part.layer, e=e) + ".weight"
            values = _tensor(part.weights, full, part.shape, cut)
            yield part.weights.scheme.experts(Dense(values))


def _mxfp4(part: Part, name: str) -> Mxfp4:
    """From blocks of 32 codes in 16 bytes, and the scale of each."""
    count, rows, columns = part.size
    if columns % 32:
        raise LoadError(
            f"{part.weights.source.path}: {name}: {columns} columns are no multiple of 32"
        )
    grid, cut = (count, rows, columns // 32), (None, part.rows(part.halves), part.columns(32))
    codes, scales = (
        _ordered(
            part.rule, _tensor(part.weights, name + part.ending(kind), size, cut, bytes_only=True)
        )
        for kind, size in (("blocks", (*grid, 16)), ("scales", grid))
    )
    return Mxfp4(codes, scales)


def _bias(part: Part) -> Tensor | None:
    """[count * halves * rows], in the compute dtype; None where another rank adds it."""
    weights, count = part.weights, part.count
    if weights.is_gguf:
        size = (count, part.shape[0])
        cut = (None, part.rows(1))
        parts = [_tensor(weights, name + ".bias", size, cut) for name in part.names]
        values = torch.stack(parts, dim=1).flatten()
    else:
        name, cut = part.names[0] + part.ending("bias"), (None, part.rows(part.halves))
        values = _ordered(part.rule, _tensor(weights, name, part.size[:2], cut))
    return values.to(weights.ops.dtype) if weights.adds_bias(part.key) else None


def _ordered(rule: Rule, values_EN: Tensor) -> Tensor:
    """[E, N, ...] to [E * N, ...], what takes turns in two halves."""
    if rule.interleaved:
        values_EN = torch.cat((values_EN[:, ::2], values_EN[:, 1::2]), dim=1)
    return values_EN.flatten(0, 1)


def _tensor(
    weights: Weights, name: str, shape: tuple[int, ...], cut: Cut, *, bytes_only: bool = False
) -> Tensor:
    """On the device, where it is put in order faster."""
    values = weights.plain(name, weights.read(name, shape, cut, bytes_only=bytes_only))
    return values.to(weights.ops.device)


def _as_weight(values: Tensor | Quantized | Mxfp4) -> Weight:
    """Of all experts' rows, one above the other."""
    return Dense(values.flatten(0, -2)) if isinstance(values, Tensor) else values


def _changed(tables: list[Weight], count: int, change: Callable[[Weight], Weight]) -> Weight:
    """``tables`` hold a part of every expert each. Changed expert by expert, for a change takes
    several times the memory of what it changes."""
    if len(tables) == 1 and change is keep:
        return tables[0]
    parts = zip(*(split(table, count) for table in tables), strict=True)
    return stack([change(part) for expert in parts for part in expert])
