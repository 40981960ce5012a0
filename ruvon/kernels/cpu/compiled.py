"""Kernels as machine code: compiled when first asked for, and kept on disk for the next start.

numba would keep them beside the sources, and would not notice when a function that a kernel calls
has changed. So they lie in the user's cache folder, under a name made of all sources here and the
versions of the compilers; numba itself adds the processor to it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import llvmlite
import numba
from llvmlite import binding
from numba import cfunc, types

from ruvon.kernels.cpu import attention, linear, rows, sample, team

Key: TypeAlias = tuple[str, int | None]
"""A kernel's name, and the kind of weight or cache it is made for if it has one (see `KINDS`)."""

KERNEL = types.void(*[types.intp] * 5)
FUNCTIONS: dict[str, tuple[Callable[..., None], types.Type]] = {
    "lead": (team.lead, types.void(*[types.intp] * 2)),
    "follow": (team.follow, types.void(*[types.intp] * 4)),
    "pack": (rows.pack, KERNEL),
    "interleave": (rows.interleave, KERNEL),
    "rms_norm": (rows.rms_norm, KERNEL),
    "layer_norm": (rows.layer_norm, KERNEL),
    "activate": (rows.activate, KERNEL),
    "add": (rows.add, KERNEL),
    "take": (rows.take, KERNEL),
    "argmax": (rows.argmax, KERNEL),
    "draw": (sample.draw, KERNEL),
}
FACTORIES: dict[str, Callable[[int], Callable[..., None]]] = {
    "embed": rows.make_embed,
    "linear": linear.make_linear,
    "write_kv": attention.make_write_kv,
    "attention": attention.make_attention,
}


def has_vnni() -> bool:
    """Whether this CPU multiplies and adds bytes 64 at a time."""
    return has_features("avx512f", "avx512bw", "avx512vnni")


def has_bf16() -> bool:
    """Whether this CPU multiplies and adds bfloat16 numbers 32 at a time."""
    return has_features("avx512f", "avx512bw", "avx512bf16")


def has_features(*names: str) -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    features = binding.get_host_cpu_features()
    return all(features.get(name, False) for name in names)


def digest_of_sources() -> str:
    """Of all files here and the versions of what compiles them."""
    digest = hashlib.sha256(repr((numba.__version__, llvmlite.__version__, sys.version)).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


IMPORTED = digest_of_sources()


def cache_folder() -> Path | None:
    """Where compiled kernels lie: in ``$RUVON_CACHE_DIR``, or the user's cache folder. None, which
    is nowhere, if the sources have been edited since this process imported them."""
    if digest_of_sources() != IMPORTED:
        return None
    home = os.environ.get("RUVON_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    root = Path(home) if home else Path.home() / ".cache"
    return root / "ruvon" / f"kernels-{IMPORTED}"


class Compiled:
    """Addresses of kernels. Holds what keeps their code alive."""

    def __init__(self) -> None:
        folder = cache_folder()
        self._folder = folder if folder is not None and is_writable(folder) else None
        self._functions: dict[Key, Any] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._functions

    def address(self, key: Key) -> int:
        """Of the compiled kernel; loads or compiles it at first use."""
        if key not in self._functions:
            self._functions[key] = self._compile(key)
        return int(self._functions[key].address)

    def _compile(self, key: Key) -> Any:
        name, kind = key
        if kind is None:
            function, signature = FUNCTIONS[name]
        else:
            function, signature = FACTORIES[name](kind), KERNEL
        with cache_in(self._folder):
            made = cfunc(signature, cache=self._folder is not None, error_model="numpy")
            return made(function)


def is_writable(folder: Path) -> bool:
    """Whether files can be kept in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


@contextmanager
def cache_in(folder: Path | None) -> Iterator[None]:
    """numba asks a global setting where to keep code: set it while it looks, then put it back."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder or "")
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
