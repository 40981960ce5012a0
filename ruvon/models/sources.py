"""Where a checkpoint's tensors come from: safetensors files, or nowhere.

Files are memory-mapped, and a tensor, or the part of it that is wanted, is read when it is asked
for. GGUF files are another such source, see `ruvon.models.gguf`.
"""

from __future__ import annotations

import json
import math
import os.path
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ruvon.errors import LoadError
from ruvon.kernels.ops import CPU, Mxfp4, Quantized
from ruvon.models.cuts import WHOLE, Cut, is_whole, take


class TensorSource(Protocol):
    """Where tensors come from, under the checkpoint's names."""

    @property
    def path(self) -> Path: ...

    def names(self) -> frozenset[str]: ...

    def read(
        self, name: str, shape: tuple[int, ...], cut: Cut = WHOLE, *, bytes_only: bool = False
    ) -> Tensor | Quantized | Mxfp4:
        """The part ``cut`` of a tensor of this shape: floating point numbers, or bytes if that is
        what is asked for; quantized ones [N, K], whatever stands before N multiplied in.

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

    def read(
        self, name: str, shape: tuple[int, ...], cut: Cut = WHOLE, *, bytes_only: bool = False
    ) -> Tensor:
        path = self.homes[name]
        try:
            file: Any = self.files[path]
            found = tuple(file.get_slice(name).get_shape())
            if found != shape:
                raise LoadError(f"{path}: {name} has shape {found}, expected {shape}")
            whole = is_whole(cut, shape)
            tensor = file.get_tensor(name) if whole else take(file.get_slice(name), cut)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise LoadError(f"{path}: cannot read {name} ({error})") from None
        is_number = tensor.is_floating_point() and tensor.itemsize > 1
        if tensor.dtype != torch.uint8 if bytes_only else not is_number:
            raise LoadError(f"{path}: {name} has the type {tensor.dtype}, which is not supported")
        assert isinstance(tensor, Tensor)
        return (
            tensor.float() if tensor.dtype == torch.float64 else tensor
        )  # more than is computed with


def weight_files(folder: Path) -> list[Path]:
    """``model.safetensors``, or else the shards that its index names, as transformers has it. What
    lies beside them is not the model: the same weights in another form, adapters, leftovers.

    Raises LoadError naming what is missing.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(whole):
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
        why = pointer_to_large_file(path) or error
        raise LoadError(f"{path}: not a readable safetensors file ({why})") from None


LFS = b"version https://git-lfs"


def pointer_to_large_file(path: Path) -> str | None:
    """What to do where git has left a pointer in place of a large file."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(LFS)) == LFS
    except OSError:
        return None
    return "a pointer of Git LFS; `git lfs pull` fetches the file" if is_pointer else None


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

    def read(
        self, name: str, shape: tuple[int, ...], cut: Cut = WHOLE, *, bytes_only: bool = False
    ) -> Tensor:
        """Every rank makes the whole, and takes its part."""
        return take(self._whole(name, shape, bytes_only), cut)

    def _whole(self, name: str, shape: tuple[int, ...], bytes_only: bool) -> Tensor:
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
