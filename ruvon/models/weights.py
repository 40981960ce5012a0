"""A checkpoint's tensors on their way into a model: find, check, cut, fuse, quantize, pack, place.

A model asks for its weights by its own names and in their whole sizes (``weights.matrix("qkv",
...)``). Its `Rule` table says what they are called in a checkpoint, and along which of their axes
the ranks of a mesh share them; what is returned is this rank's part, and no more is read. A tensor
is read when it is asked for, so a load needs about one weight's memory beyond the packed model, or
that of as many weights as are loaded at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ruvon.errors import LoadError
from ruvon.kernels.ops import Dense, Mxfp4, Ops, Packed, Quantized, Weight
from ruvon.models.cuts import WHOLE, Cut, as_dense
from ruvon.models.quantize import Scheme, keep, stack
from ruvon.models.shares import Axis, Share
from ruvon.models.sources import RandomTensors, TensorSource
from ruvon.telemetry import Progress, silent

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rule:
    """What one of a model's modules is called elsewhere: ``{i}`` is the layer.

    Several names are parts of one matrix, stacked along N. Names lack their ``endings``, which GGUF
    has as usual: ``.weight`` and ``.bias``.
    """

    hugging_face: tuple[str, ...]
    gguf: tuple[str, ...]
    transposed: bool = False  # Hugging Face keeps it K×N (GPT-2's Conv1D); GGUF never does
    endings: Mapping[str, str] = field(default_factory=dict)  # by kind, where they are others
    rows: Axis | None = None  # what ranks share its rows along, and with it a bias
    columns: Axis | None = None  # or its columns: then its products are sums over the ranks
    interleaved: bool = False  # experts' gates take turns with what they gate; never in GGUF
    each: tuple[str, ...] = ()  # what the parts of expert ``{e}`` are called, if each is a tensor


@dataclass(slots=True)
class Weights:
    """Serves a model its weights by its own names, to any thread. Ask for everything, then
    `finish`."""

    source: TensorSource
    rules: Mapping[str, Rule]
    scheme: Scheme
    ops: Ops
    share: Share
    ignored: tuple[str, ...] = ()  # endings of names that hold no weight of the model
    progress: Progress = silent
    is_gguf: bool = False
    at_once: int = 1  # layers
    used: set[str] = field(default_factory=set)
    names: frozenset[str] = field(init=False)  # asked for once: there may be many thousands

    def __post_init__(self) -> None:
        self.names = self.source.names()

    def layers(self, build: Callable[[int], T]) -> tuple[T, ...]:
        """Every layer of this stage, in order: ``build(i)`` asks for the weights of layer ``i``."""
        built = []
        with ThreadPoolExecutor(self.at_once, "ruvon-weights") as threads:
            for layer in threads.map(build, self.share.layers):
                built.append(layer)
                self.progress("loading weights", len(built) / (len(self.share.layers) + 1))
        return tuple(built)

    def matrix(
        self,
        key: str,
        rows: Sequence[int],
        columns: int,
        layer: int = 0,
        *,
        quantize: bool = True,
    ) -> Packed:
        """A projection [sum(rows), columns]; ``rows`` are those of its parts, in order. As in all
        that follows, sizes are the whole's, and what is returned is this rank's share."""
        change = self.scheme.projection if quantize else keep
        return self._packed(key, change, self._stacked(key, rows, columns, layer), layer)

    def table(self, key: str, rows: int, columns: int, *, quantize: bool = True) -> Packed:
        """An embedding table or head [rows, columns]."""
        change = self.scheme.table if quantize else keep
        return self._packed(key, change, self._stacked(key, (rows,), columns, 0), 0)

    def holds(self, key: str) -> bool:
        """Whether the checkpoint has the matrix ``key``, which is in no layer and one tensor."""
        name = self._stored(key)[0] + self.ending(key, "weight")
        return not self.names.isdisjoint(self._spellings(name))

    def equal(self, key: str, other: str, rows: int, columns: int) -> bool:
        """Whether two matrices [rows, columns] of a folder hold the same numbers."""
        shape = (rows,), (columns,), 0, "weight"
        left, right = (self.plain(one, *self._parts(one, *shape)) for one in (key, other))
        return left.dtype == right.dtype and torch.equal(left, right)

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of this full name, in either of its spellings."""
        if isinstance(self.source, RandomTensors):
            return self.source.has(name)
        return not self.names.isdisjoint(self._spellings(name))

    def read(
        self, name: str, shape: tuple[int, ...], cut: Cut = WHOLE, *, bytes_only: bool = False
    ) -> Tensor | Quantized | Mxfp4:
        """Of the tensor of this full name, as the source has it, the part ``cut``."""
        return self.source.read(self._find(name), shape, cut, bytes_only=bytes_only)

    def norm(self, key: str, size: int, layer: int = 0, kind: str = "weight") -> Tensor:
        """A norm's weight or bias, or another vector that wants precision: float32 [size]."""
        (vector,) = self._parts(key, (size,), (), layer, kind)
        return self._vector(key, vector).to(self.ops.device, torch.float32)

    def bias(self, key: str, rows: Sequence[int], layer: int = 0) -> Tensor | None:
        """A projection's bias in the compute dtype, [sum(rows)]. None where another rank adds it:
        to a sum over all of them it is added once."""
        parts = [self._vector(key, part) for part in self._parts(key, rows, (), layer, "bias")]
        if not self.adds_bias(key):
            return None
        return torch.cat(parts).to(self.ops.device, self.ops.dtype)

    def finish(self) -> None:
        """Raises LoadError if the checkpoint holds tensors that nobody asked for."""
        left = {name for name in self.names - self.used if not name.endswith(self.ignored)}
        if self.share.mesh.stages > 1:
            left -= self._elsewhere(left)
        if strangers := sorted(left):
            more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
            some = ", ".join(strangers[:3]) + more
            raise LoadError(f"{self.source.path}: the model has no use for {some}")

    def _elsewhere(self, names: set[str]) -> set[str]:
        """Those that another stage asks for: tables, and what is in layers that are not here."""
        templates = [
            re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"\d+")
            for key, rule in self.rules.items()
            for template in (*self._stored(key), *rule.each)
        ]
        found = set()
        for template in templates:
            bare = template.partition(r"\.")[2]
            pattern = re.compile(
                rf"(?:{template}|{bare.replace('?P<i>', '?P<j>')})(?:[._][a-z_.]+)?"
            )
            for match in filter(None, map(pattern.fullmatch, names)):
                layer = next(filter(None, match.groups()), None)
                if layer is None or int(layer) not in self.share.layers:
                    found.add(match.string)
        return found

    def adds_bias(self, key: str) -> bool:
        """Whether a bias of this matrix is added on this rank."""
        return self.rules[key].columns is None or self.share.mesh.rank == 0

    def _stacked(self, key: str, rows: Sequence[int], columns: int, layer: int) -> Weight:
        parts = self._parts(key, rows, (columns,), layer, "weight")
        return stack([as_dense(part) for part in parts])

    def _packed(
        self, key: str, change: Callable[[Weight], Weight], weight: Weight, layer: int
    ) -> Packed:
        try:
            return self.ops.pack(change(self._placed(weight)))
        except LoadError as error:
            raise LoadError(f"{self.source.path}: {key} of layer {layer}: {error}") from None

    def _placed(self, weight: Weight) -> Weight:
        """Plain numbers where they will be computed with: a GPU quantizes much faster too."""
        if isinstance(weight, Dense):
            return Dense(weight.weight_NK.to(self.ops.device))
        return weight

    def _parts(
        self, key: str, rows: Sequence[int], columns: tuple[int, ...], layer: int, kind: str
    ) -> list[Tensor | Quantized | Mxfp4]:
        rule, names = self.rules[key], self._stored(key)
        mine = [self.share.part(rule.rows, size, place) for place, size in enumerate(rows)]
        kept = [[part] for part in mine]
        if len(names) != len(rows):  # all in one, one behind the other
            firsts = [sum(rows[:place]) for place in range(len(rows))]
            pairs = zip(mine, firsts, strict=True)
            kept = [[range(p.start + first, p.stop + first) for p, first in pairs]]
            rows = (sum(rows),)
        across = [(self.share.part(rule.columns, size),) for size in columns]
        turned = rule.transposed and not self.is_gguf and bool(columns)
        parts = []
        for name, count, ranges in zip(names, rows, kept, strict=True):
            shape, cut = (count, *columns), (ranges, *across)
            found = name.format(i=layer) + self.ending(key, kind)
            if turned:
                shape, cut = shape[::-1], cut[::-1]
            values = self.read(found, shape, cut)
            parts.append(values.T if turned and isinstance(values, Tensor) else values)
        return parts

    def _vector(self, key: str, values: Tensor | Quantized | Mxfp4) -> Tensor:
        """All numbers: where products round their inputs to codes, nothing would tell later."""
        vector = self.plain(key, values)
        if not vector.isfinite().all():
            raise LoadError(f"{self.source.path}: {key} has values that are no numbers")
        return vector

    def plain(self, key: str, values: Tensor | Quantized | Mxfp4) -> Tensor:
        """What is no matrix of a GGUF file, of which alone there are quantized ones."""
        if not isinstance(values, Tensor):
            raise LoadError(f"{self.source.path}: {key} is quantized, which only matrices are")
        return values

    def _stored(self, key: str) -> tuple[str, ...]:
        """What the parts of ``key`` are called in this kind of checkpoint."""
        return self.rules[key].gguf if self.is_gguf else self.rules[key].hugging_face

    def ending(self, key: str, kind: str) -> str:
        """How the name of a tensor of ``key`` ends: "weight", "bias" and the like."""
        usual = f".{kind}"
        return usual if self.is_gguf else self.rules[key].endings.get(kind, usual)

    def _spellings(self, name: str) -> tuple[str, str]:
        """Checkpoints of a bare model leave out the first word (``transformer.``, ``model.``)."""
        return name, name.partition(".")[2]

    def _find(self, name: str) -> str:
        found = next((known for known in self._spellings(name) if known in self.names), name)
        if found not in self.names and not isinstance(self.source, RandomTensors):
            raise LoadError(f"{self.source.path}: no tensor {name}")
        self.used.add(found)
        return found
