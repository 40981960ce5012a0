"""`ruvon models`: what a server serves, or what this machine could serve without downloading."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CachedRepoInfo, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from rich.console import Console
from rich.table import Table

from ruvon.cli.client import Client
from ruvon.config import EngineConfig
from ruvon.errors import RuvonError
from ruvon.locate import embedded_name, find_embedded, first_part


@dataclass(frozen=True, slots=True)
class Found:
    """A model on disk. ``name`` is what ``ruvon serve`` takes."""

    name: str
    kind: str
    size: int  # bytes
    path: Path | None = None


def print_remote(url: str, api_key: str | None) -> None:
    """The model ids a server lists, with their context lengths where it tells them."""
    table = Table("model", "context", "owner", box=None)
    for model in Client(url, api_key).get("/v1/models").get("data", []):
        context = model.get("max_model_len")
        table.add_row(model["id"], f"{context:,}" if context else "", model.get("owned_by", ""))
    Console().print(table)


def print_local() -> None:
    """The embedded default and what the hub's cache holds."""
    table = Table("model", "kind", "size", box=None)
    for found in (*embedded(), *cached()):
        table.add_row(found.name, found.kind, f"{found.size / 1e6:,.0f} MB")
    console = Console(soft_wrap=True)
    if table.row_count:
        console.print(table)
    else:
        console.print("No model on this machine: make setup installs the default one.")


def embedded() -> Iterator[Found]:
    """The model that ``ruvon serve`` uses when none is named."""
    if name := embedded_name():
        yield Found(name, "embedded default", find_embedded().stat().st_size)


def cached() -> Iterator[Found]:
    """What the hub's cache holds and ruvon can run: repositories of safetensors by their id, and
    GGUF files, of which a repository has many, by their path."""
    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        if repo.repo_type == "model":
            yield from filter(runs, in_repository(repo))


def in_repository(repo: CachedRepoInfo) -> Iterator[Found]:
    """What may be a model. Of a repository it is the newest version that an id names, ``main``."""
    for revision in sorted(repo.revisions, key=lambda revision: revision.commit_hash):
        sizes = {file.file_path: file.size_on_disk for file in revision.files}
        kept = [size for path, size in sizes.items() if path.suffix == ".safetensors"]
        if kept and "main" in revision.refs:
            yield Found(repo.repo_id, "hub cache", sum(kept), revision.snapshot_path)
        for path in sorted(sizes):
            if path.suffix == ".gguf" and path == first_part(path):
                size = sum(sizes[part] for part in sizes if first_part(part) == path)
                yield Found(str(path), "hub cache, gguf", size, path)


def runs(found: Found) -> bool:
    """Whether the files are whole, as far as their beginnings tell, and the model is supported."""
    from ruvon.models.checkpoint import open_checkpoint  # imports torch, only for what is cached
    from ruvon.models.sources import SafetensorsFolder
    from ruvon.telemetry import silent

    try:
        checkpoint = open_checkpoint(EngineConfig(model=str(found.path)), silent)
        if checkpoint.format == "safetensors":
            SafetensorsFolder(checkpoint.path)
    except RuvonError:
        return False
    return True
