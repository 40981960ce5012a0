"""Opening a checkpoint: what a folder or a GGUF file says of its model.

Weights are safetensors or GGUF, nothing else: no pickle is opened and no code that comes with a
model is run.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog

from ruvon.config import EngineConfig
from ruvon.errors import ConfigError, LoadError
from ruvon.locate import is_embedded, locate
from ruvon.models.defaults import gguf_generation
from ruvon.models.gguf import GgufFile
from ruvon.models.mixtures import is_original
from ruvon.models.spec import ModelSpec, spec_from_config
from ruvon.models.spec_gguf import spec_from_gguf
from ruvon.telemetry import Progress

log = structlog.get_logger(__name__)

EMBEDDED_SAMPLING = {"temperature": 0.2, "top_p": 0.9}  # its authors'; the file does not say
ADAPTER = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk, not yet read but for its description."""

    name: str  # as served by default: "SmolLM2-135M-Instruct", "Qwen/Qwen3-0.6B"
    format: Literal["safetensors", "gguf", "dummy"]
    path: Path  # the folder, or the .gguf file
    spec: ModelSpec
    config: Mapping[str, Any]  # config.json, or GGUF metadata
    generation: Mapping[str, Any]  # generation_config.json, or what stands for it
    gguf: GgufFile | None = field(default=None, repr=False)  # the open file, if it is one

    @property
    def words(self) -> Path:
        """The folder of the vocabulary and the chat template."""
        return words_folder(self.path, self.config)


def open_checkpoint(config: EngineConfig, progress: Progress) -> Checkpoint:
    """Finds (and, from the hub, fetches) what ``config.model`` names and reads its description.

    Raises LoadError if it is not there or cannot be used, ConfigError if settings contradict it.
    """
    path, name = locate(config, progress)
    if path.suffix == ".gguf" and not path.is_dir():
        return _open_gguf(path, name, config.load_format)
    if config.load_format == "gguf":
        raise ConfigError(f"load_format gguf: {path} holds no .gguf file")
    return _open_folder(path, name, dummy=config.load_format == "dummy")


def _open_gguf(path: Path, name: str, load_format: str) -> Checkpoint:
    if load_format not in ("auto", "gguf"):
        raise ConfigError(f"load_format {load_format}: {path} is a GGUF file")
    file = GgufFile(path)
    try:
        spec = spec_from_gguf(file.metadata, file.names(), file.rope_divisors())
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from None
    usual = EMBEDDED_SAMPLING if is_embedded(path) else {}
    generation = {**usual, **gguf_generation(file.metadata)}
    return Checkpoint(name, "gguf", path, spec, file.metadata, generation, file)


def _open_folder(folder: Path, name: str, *, dummy: bool) -> Checkpoint:
    config = read_json(folder / "config.json")
    if (adapter := folder / ADAPTER).exists():
        log.warning("adapter_left_out", file=str(adapter), reason="only the model's own is read")
    generation_path = words_folder(folder, config) / "generation_config.json"
    generation = read_json(generation_path) if os.path.lexists(generation_path) else {}
    try:
        spec = spec_from_config(config, generation)
    except LoadError as error:
        raise LoadError(f"{folder}: {error}") from None
    return Checkpoint(name, "dummy" if dummy else "safetensors", folder, spec, config, generation)


def words_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """OpenAI's layout is weights only, and lies in a folder of Hugging Face's."""
    beside = is_original(config) and not (folder / "tokenizer.json").exists()
    return folder.resolve().parent if beside else folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises LoadError naming the file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise LoadError(f"{path}: not a JSON object")
    return value
