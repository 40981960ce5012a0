"""What one rank of a mesh holds of a model.

Stages share the layers out, in order. The ranks of a stage share every layer: each has some of
attention's heads, with the columns of the output projection that read them; some of the MLP's
width, or of every expert's; some of the vocabulary's rows of embedding and head. Norms, routers,
learned positions and what is added once (biases behind a sum over ranks) are not cut.

Shares need not be equal: GPT-2 XL's 25 heads are 13 and 12. Where there are more ranks than key
and value heads, several hold the same one, each with some of the queries that read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

from ruvon.errors import ConfigError
from ruvon.kernels.mesh import ALONE, Mesh
from ruvon.models.spec import ModelSpec

Axis: TypeAlias = Literal["heads", "width", "vocabulary"]
"""What a weight's rows or columns are cut along: a `Rule` says which."""

UNITS = (256, 128, 64, 32)
"""Widths and vocabularies are cut between units of so many: the coarsest of which every rank gets
as many. 256 is a block of llama.cpp's K-quants, 32 what kernels compute together, and a group of
all quantized formats."""


@dataclass(frozen=True)
class Share:
    """A rank's part, by number: which of the whole model's layers, heads, columns, rows."""

    spec: ModelSpec  # of the whole
    mesh: Mesh
    layers: range
    heads: range
    kv_heads: range
    width: range  # of the MLP, or of every expert
    vocabulary: range

    @cached_property
    def local(self) -> ModelSpec:
        """The spec of a model with as many heads and that width; its layers are still all."""
        experts = self.spec.experts
        return replace(
            self.spec,
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.width),
            experts=None if experts is None else replace(experts, width=len(self.width)),
        )

    def part(self, axis: Axis | None, size: int, place: int = 0) -> range:
        """Which of ``size`` rows or columns along an axis are here. Of queries, keys and values
        side by side, ``place`` is 0, 1 or 2."""
        match axis:
            case None:
                return range(size)
            case "width":
                held, of = self.width, self.spec.intermediate_size
            case "vocabulary":
                held, of = self.vocabulary, self.spec.vocab_size
            case "heads" if place == 0:
                held, of = self.heads, self.spec.num_heads
            case "heads":
                held, of = self.kv_heads, self.spec.num_kv_heads
        each = size // of
        return range(held.start * each, held.stop * each)

    @property
    def vocabulary_widths(self) -> tuple[int, ...]:
        """How many rows of the head each rank has."""
        size = self.mesh.size
        return tuple(len(_rows(self.spec.vocab_size, rank, size)) for rank in range(size))


def share_of(spec: ModelSpec, mesh: Mesh = ALONE) -> Share:
    """Raises ConfigError if there are more ranks, or stages, than parts."""
    rank, size = mesh.rank, mesh.size
    if size > (most := _most_ranks(spec)):
        raise ConfigError(
            f"--tensor-parallel-size {size}: {spec.num_heads} attention heads, an MLP of "
            f"{spec.intermediate_size} and a vocabulary of {spec.vocab_size}, both cut by "
            f"{UNITS[-1]}, are enough for 1 to {most}"
        )
    if mesh.stages > spec.num_layers:
        raise ConfigError(
            f"--pipeline-parallel-size {mesh.stages}: a model of {spec.num_layers} layers has at "
            "most as many stages"
        )
    heads, kv_heads = heads_of(spec.num_heads, spec.num_kv_heads, rank, size)
    return Share(
        spec=spec,
        mesh=mesh,
        layers=portion(spec.num_layers, mesh.stage, mesh.stages),
        heads=heads,
        kv_heads=kv_heads,
        width=_rows(spec.intermediate_size, rank, size),
        vocabulary=_rows(spec.vocab_size, rank, size),
    )


def portion(total: int, rank: int, size: int, unit: int = 1) -> range:
    """A rank's part of ``total``, cut between units; the first ranks have one more where they do
    not divide."""
    units = -(-total // unit)
    extra = units % size
    first = rank * (units // size) + min(rank, extra)
    last = first + units // size + (rank < extra)
    return range(first * unit, min(last * unit, total))


def heads_of(heads: int, kv_heads: int, rank: int, size: int) -> tuple[range, range]:
    """A rank's query heads, and the key/value heads that they read."""
    group = heads // kv_heads
    if kv_heads >= size:
        held = portion(kv_heads, rank, size)
        return range(held.start * group, held.stop * group), held
    for head in range(kv_heads):  # several ranks have the same one
        sharing = portion(size, head, kv_heads)
        if rank in sharing:
            queries = portion(group, rank - sharing.start, len(sharing))
            first = head * group
            return range(first + queries.start, first + queries.stop), range(head, head + 1)
    raise AssertionError("every rank has a head")


def _rows(total: int, rank: int, size: int) -> range:
    """Of a width or a vocabulary."""
    even = (unit for unit in UNITS if total % (unit * size) == 0)
    return portion(total, rank, size, next(even, UNITS[-1]))


def _most_ranks(spec: ModelSpec) -> int:
    cut = (-(-size // UNITS[-1]) for size in (spec.intermediate_size, spec.vocab_size))
    return min(spec.num_heads, *cut)
