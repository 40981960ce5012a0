"""`ruvon models`: what a server serves, or what this machine could serve without downloading."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from rich.console import Console
from rich.table import Table

from ruvon.cli.client import Client
from ruvon.errors import LoadError
from ruvon.models.checkpoint import find_embedded


@dataclass(frozen=True, slots=True)
class Found:
    """A model on disk. ``name`` is what ``ruvon serve`` takes."""

    name: str
    kind: str
    size: int  # bytes


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
    try:
        path = find_embedded()
    except LoadError:
        return
    yield Found(path.stem, "embedded default", path.stat().st_size)


def cached() -> Iterator[Found]:
    """Repositories in the hub's cache that hold weights ruvon reads."""
    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        names = {file.file_name for revision in repo.revisions for file in revision.files}
        formats = [kind for kind in ("safetensors", "gguf") if _any_ends(names, kind)]
        if repo.repo_type == "model" and formats:
            yield Found(repo.repo_id, f"hub cache, {' and '.join(formats)}", repo.size_on_disk)


def _any_ends(names: set[str], kind: str) -> bool:
    return any(name.endswith("." + kind) for name in names)
