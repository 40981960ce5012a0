"""A checkpoint's tensors on their way into a model: find, check, fuse, quantize, pack, place.

A model asks for its weights by its own names (``weights.matrix("qkv", ...)``) and its `Rule` table
says what they are called in a checkpoint. Files are memory-mapped and a tensor is read when it is
asked for, so a load needs about one weight's memory beyond the packed model, or that of as many
weights as are loaded at once.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ruvon.errors import LoadError
from ruvon.kernels.ops import CPU, Dense, Mxfp4, Ops, Packed, Quantized, Weight
from ruvon.models.quantize import Scheme, keep, stack
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
    interleaved: bool = False  # experts' gates take turns with what they gate; never in GGUF
    each: tuple[str, ...] = ()  # what the parts of expert ``{e}`` are called, if each is a tensor


class TensorSource(Protocol):
    """Where tensors come from, under the checkpoint's names."""

    @property
    def path(self) -> Path: ...

    def names(self) -> frozenset[str]: ...

    def read(
        self, name: str, shape: tuple[int, ...], *, bytes_only: bool = False
    ) -> Tensor | Quantized | Mxfp4:
        """Floating point numbers, or bytes if that is what is asked for; quantized ones [N, K],
        whatever stands before N in ``shape`` multiplied in.

        Raises LoadError, naming file and tensor, if it is of another shape or type or cannot be
        read."""


class SafetensorsFolder:
    """The safetensors files that are a folder's model."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers only. Raises LoadError naming a missing or damaged file."""
        self.path = folder
        self.files = {path: _open(path) for path in weight_files(folder)}
        self.homes = {name: path for path, file in self.files.items() for name in _keys(file)}

    def names(self) -> frozenset[str]:
        return frozenset(self.homes)

    def read(self, name: str, shape: tuple[int, ...], *, bytes_only: bool = False) -> Tensor:
        path = self.homes[name]
        try:
            tensor: Tensor = self.files[path].get_tensor(name)  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise LoadError(f"{path}: cannot read {name} ({error})") from None
        if tuple(tensor.shape) != shape:
            found = tuple(tensor.shape)
            raise LoadError(f"{path}: {name} has shape {found}, expected {shape}")
        is_number = tensor.is_floating_point() and tensor.itemsize > 1
        if tensor.dtype != torch.uint8 if bytes_only else not is_number:
            raise LoadError(f"{path}: {name} has the type {tensor.dtype}, which is not supported")
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """``model.safetensors``, or else the shards that its index names, as transformers has it. What
    lies beside them is not the model: the same weights in another form, adapters, leftovers.

    Raises LoadError naming what is missing.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists() and (shards := sorted(folder.glob("model--*-of-*.safetensors"))):
        return shards  # OpenAI's layout of gpt-oss-120b
    if not index.exists():
        found = ", ".join(sorted(path.name for path in folder.glob("*.safetensors")))
        but = f"only {found}" if found else "other formats, pickle above all, are not read"
        raise LoadError(f"{folder}: no {whole.name} and no {index.name} ({but})")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [folder / Path(name).name for name in names]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(f"{index}: not a readable index ({error})") from None


def _keys(file: safe_open) -> list[str]:
    return list(file.keys())  # type: ignore[no-untyped-call]


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path}: not a readable safetensors file ({error})") from None


@dataclass(frozen=True, slots=True)
class RandomTensors:
    """Random weights of any shape, the same ones for the same name and seed on one device, where
    they are made: a model of 14 GB takes seconds."""

    path: Path  # of the config they stand in for
    seed: int
    dtype: torch.dtype
    mxfp4: bool = False  # whether experts come in it
    device: torch.device = CPU

    def names(self) -> frozenset[str]:
        return frozenset()

    def has(self, name: str) -> bool:
        """Whether a checkpoint like this one would hold it."""
        return self.mxfp4 or not name.endswith("blocks")

    def read(self, name: str, shape: tuple[int, ...], *, bytes_only: bool = False) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode(), self.seed))
        if bytes_only:
            return self._bytes(shape, generator, name.endswith("scales"))
        if len(shape) == 1:  # norms and biases leave things as they are
            fill = 1.0 if name.endswith((".weight", ".scale")) else 0.0
            return torch.full(shape, fill, dtype=self.dtype, device=self.device)
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        return values.normal_(std=0.02, generator=generator)

    def _bytes(self, shape: tuple[int, ...], generator: torch.Generator, scales: bool) -> Tensor:
        """Codes, whatever bits; or scales with which they are as large as other weights."""
        if scales:
            return torch.full(shape, 127 - 7, dtype=torch.uint8, device=self.device)
        count = math.prod(shape) // 8
        if self.device.type == "cpu":  # twice as fast as torch's
            words = torch.from_numpy(np.random.SFC64(generator.initial_seed()).random_raw(count))
        else:
            words = torch.empty(count, dtype=torch.int64, device=self.device)
            words.random_(-(2**63), None, generator=generator)
        return words.view(torch.uint8).view(shape)


@dataclass(slots=True)
class Weights:
    """Serves a model its weights by its own names, to any thread. Ask for everything, then
    `finish`."""

    source: TensorSource
    rules: Mapping[str, Rule]
    scheme: Scheme
    ops: Ops
    num_layers: int
    ignored: tuple[str, ...] = ()  # endings of names that hold no weight of the model
    progress: Progress = silent
    is_gguf: bool = False
    at_once: int = 1  # layers
    used: set[str] = field(default_factory=set)
    names: frozenset[str] = field(init=False)  # asked for once: there may be many thousands

    def __post_init__(self) -> None:
        self.names = self.source.names()

    def layers(self, build: Callable[[int], T]) -> tuple[T, ...]:
        """Every layer, in order: ``build(i)`` asks for the weights of layer ``i``."""
        built = []
        with ThreadPoolExecutor(self.at_once, "ruvon-weights") as threads:
            for layer in threads.map(build, range(self.num_layers)):
                built.append(layer)
                self.progress("loading weights", len(built) / (self.num_layers + 1))
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
        """A projection [sum(rows), columns]; ``rows`` are those of its parts, in order."""
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
        self, name: str, shape: tuple[int, ...], *, bytes_only: bool = False
    ) -> Tensor | Quantized | Mxfp4:
        """The tensor of this full name, as the source has it."""
        return self.source.read(self._find(name), shape, bytes_only=bytes_only)

    def norm(self, key: str, size: int, layer: int = 0, kind: str = "weight") -> Tensor:
        """A norm's weight or bias, or another vector that wants precision: float32 [size]."""
        (vector,) = self._parts(key, (size,), (), layer, kind)
        return self.plain(key, vector).to(self.ops.device, torch.float32)

    def bias(self, key: str, rows: Sequence[int], layer: int = 0) -> Tensor:
        """A projection's bias in the compute dtype, [sum(rows)]."""
        parts = [self.plain(key, part) for part in self._parts(key, rows, (), layer, "bias")]
        return torch.cat(parts).to(self.ops.device, self.ops.dtype)

    def finish(self) -> None:
        """Raises LoadError if the checkpoint holds tensors that nobody asked for."""
        left = self.names - self.used
        if strangers := sorted(name for name in left if not name.endswith(self.ignored)):
            more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
            some = ", ".join(strangers[:3]) + more
            raise LoadError(f"{self.source.path}: the model has no use for {some}")

    def _stacked(self, key: str, rows: Sequence[int], columns: int, layer: int) -> Weight:
        parts = self._parts(key, rows, (columns,), layer, "weight")
        return stack([Dense(part) if isinstance(part, Tensor) else part for part in parts])

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
        counts = rows if len(names) == len(rows) else (sum(rows),)
        turned = rule.transposed and not self.is_gguf and bool(columns)
        parts = []
        for name, count in zip(names, counts, strict=True):
            shape = (count, *columns)
            found = name.format(i=layer) + self.ending(key, kind)
            values = self.read(found, shape[::-1] if turned else shape)
            parts.append(values.T if turned and isinstance(values, Tensor) else values)
        return parts

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
