"""A layer's experts on their way into a model, from any of the forms that checkpoints have them in.

All experts of a layer as one tensor (E×N×K, or E×K×N for what was written to be multiplied from the
left), with gates and what they gate in two halves, in turns, or in two tensors; or each expert by
itself, in tensors of its own. MXFP4 comes as blocks of codes and their scales. Whatever it is, it
becomes what `Experts` says: an expert's rows together, those of its gate first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ruvon.errors import LoadError
from ruvon.kernels.ops import Dense, Experts, ExpertsSpec, Mxfp4, PackedExperts, Quantized, Weight
from ruvon.models.quantize import keep, split, stack
from ruvon.models.weights import Weights


def load_experts(
    weights: Weights, spec: ExpertsSpec, hidden: int, layer: int, *, bias: bool
) -> PackedExperts:
    """A layer's experts, under the rules ``experts_up`` and ``experts_down``, packed."""
    pack = weights.ops.pack_experts
    assert pack is not None, "a backend without experts was refused before"
    up, down = ("experts_up", spec.width, hidden), ("experts_down", hidden, spec.width)
    experts = Experts(
        up=_weight(weights, *up, spec.num_experts, layer, halves=2),
        up_bias_N=_bias(weights, *up[:2], spec.num_experts, layer, halves=2) if bias else None,
        down=_weight(weights, *down, spec.num_experts, layer),
        down_bias_N=_bias(weights, *down[:2], spec.num_experts, layer) if bias else None,
    )
    try:
        return pack(experts, spec)
    except LoadError as error:
        raise LoadError(f"{weights.source.path}: experts of layer {layer}: {error}") from None


def _weight(
    weights: Weights, key: str, rows: int, columns: int, count: int, layer: int, halves: int = 1
) -> Weight:
    """[count * halves * rows, columns], changed as the scheme has it."""
    rule, change = weights.rules[key], weights.scheme.experts
    if weights.is_gguf:
        names = [name.format(i=layer) + ".weight" for name in rule.gguf]
        tables = [_as_weight(weights.read(name, (count, rows, columns))) for name in names]
        return _changed(tables, count, change)
    name, shape = rule.hugging_face[0].format(i=layer), (count, halves * rows, columns)
    if weights.has(name + weights.ending(key, "blocks")):
        return _changed([_mxfp4(weights, key, name, shape)], count, change)
    whole = name + weights.ending(key, "weight")
    if weights.has(whole) or not rule.each:
        turned = (count, columns, halves * rows) if rule.transposed else shape
        values = _tensor(weights, whole, turned)
        values = values.transpose(1, 2) if rule.transposed else values
        return _changed([Dense(_ordered(weights, key, values))], count, change)
    return stack(list(_one_by_one(weights, key, (rows, columns), count, layer)))


def _one_by_one(
    weights: Weights, key: str, shape: tuple[int, int], count: int, layer: int
) -> Iterator[Weight]:
    """Each expert by itself; its gate stands before what it gates, by the rule."""
    for e in range(count):
        for name in weights.rules[key].each:
            values = _tensor(weights, name.format(i=layer, e=e) + ".weight", shape)
            yield weights.scheme.experts(Dense(values))


def _mxfp4(weights: Weights, key: str, name: str, shape: tuple[int, int, int]) -> Mxfp4:
    """From blocks of 32 codes in 16 bytes, and the scale of each."""
    count, rows, columns = shape
    if columns % 32:
        raise LoadError(f"{weights.source.path}: {name}: {columns} columns are no multiple of 32")
    grid = (count, rows, columns // 32)
    codes, scales = (
        _tensor(weights, name + weights.ending(key, kind), size, bytes_only=True)
        for kind, size in (("blocks", (*grid, 16)), ("scales", grid))
    )
    return Mxfp4(_ordered(weights, key, codes), _ordered(weights, key, scales))


def _bias(weights: Weights, key: str, rows: int, count: int, layer: int, halves: int = 1) -> Tensor:
    """[count * halves * rows], in the compute dtype."""
    rule = weights.rules[key]
    if weights.is_gguf:
        names = [name.format(i=layer) + ".bias" for name in rule.gguf]
        parts = [_tensor(weights, name, (count, rows)) for name in names]
        values = torch.stack(parts, dim=1).flatten()
    else:
        name = rule.hugging_face[0].format(i=layer) + weights.ending(key, "bias")
        values = _ordered(weights, key, _tensor(weights, name, (count, halves * rows)))
    return values.to(weights.ops.dtype)


def _ordered(weights: Weights, key: str, values_EN: Tensor) -> Tensor:
    """[E, N, ...] to [E * N, ...], what takes turns in two halves."""
    if weights.rules[key].interleaved:
        values_EN = torch.cat((values_EN[:, ::2], values_EN[:, 1::2]), dim=1)
    return values_EN.flatten(0, 1)


def _tensor(
    weights: Weights, name: str, shape: tuple[int, ...], *, bytes_only: bool = False
) -> Tensor:
    """On the device, where it is put in order faster."""
    values = weights.plain(name, weights.read(name, shape, bytes_only=bytes_only))
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
