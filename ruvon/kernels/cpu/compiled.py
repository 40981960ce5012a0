"""Kernels as machine code: compiled when first asked for, and kept on disk for the next start.

They lie in the user's cache folder as object files, under a name made of all sources here, the
versions of the compilers and the CPU. Loading one takes a millisecond, and nothing of numba.
What is kept is a convenience: a folder that is full, damaged or read-only costs time, no more.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from subprocess import DEVNULL

import structlog
from llvmlite import binding, ir

from ruvon.config import cache_root
from ruvon.kernels.cpu.arguments import Key
from ruvon.kernels.cpu.formats import F16_CACHE
from ruvon.kernels.cpu.isa import Isa, choose, target_features

log = structlog.get_logger(__name__)

DIFFER_BY_ISA = ("linear", "experts", "attention")
"""Kernels written for an instruction set; of the others LLVM makes the best it can."""

USUAL: tuple[Key, ...] = (("attention", F16_CACHE), ("sample", None))
"""Kernels that nearly every start needs: half of the work where nothing has been compiled."""

FORGOTTEN_AFTER = 30 * 24 * 3600  # seconds that the code of another version lies unused


def digest_of_sources() -> str:
    """Of all files here and the versions of what compiles them."""
    digest = hashlib.sha256(repr((version("numba"), version("llvmlite"), sys.version)).encode())
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


IMPORTED = digest_of_sources()


class Store:
    """Object files on disk, by name. Whatever goes wrong with the disk is logged once and costs
    nothing but the time to compile again."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder  # None where there is none that can be written to

    def __contains__(self, name: str) -> bool:
        return self.folder is not None and (self.folder / name).exists()

    def read(self, name: str) -> bytes | None:
        """What was kept under this name, if it is whole."""
        if self.folder is None:
            return None
        try:
            kept = (self.folder / name).read_bytes()
        except OSError:
            return None
        digest, code = kept[:32], kept[32:]
        return code if hashlib.sha256(code).digest() == digest else None

    def write(self, name: str, code: bytes) -> None:
        """Keep it, whole or not at all: others may read and write the same at this moment."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as beside:
                whole = Path(beside, name)
                whole.write_bytes(hashlib.sha256(code).digest() + code)
                os.replace(whole, self.folder / name)
        except OSError as error:
            log.warning("kernels_not_kept", folder=str(self.folder), error=error.strerror)
            self.folder = None

    def forget_others(self) -> None:
        """Note that this version is in use, and remove what others left behind long ago."""
        if self.folder is None:
            return
        with suppress(OSError):
            os.utime(self.folder)
            for folder in self.folder.parent.glob("kernels-*"):
                if time.time() - folder.stat().st_mtime > FORGOTTEN_AFTER:
                    shutil.rmtree(folder, ignore_errors=True)


def open_store() -> Store:
    """Where kernels of these sources lie; nowhere if they have been edited since this process
    imported them."""
    root = cache_root()
    if root is None or digest_of_sources() != IMPORTED:
        return Store(None)
    store = Store(root / f"kernels-{IMPORTED}")
    store.forget_others()
    return store


def name_of(key: Key, isa: Isa) -> str:
    """A kernel's file: tells apart code for one CPU from code for another."""
    written_for = isa.name if key[0] in DIFFER_BY_ISA else "any"
    target = f"{binding.get_host_cpu_name()} {written_for} {target_features(isa)}"
    return f"{symbol_of(key)}-{hashlib.sha256(target.encode()).hexdigest()[:8]}.o"


def symbol_of(key: Key) -> str:
    return "_".join(str(part) for part in ("ruvon", *key) if part is not None)


def build(key: Key, isa: Isa, store: Store) -> bytes:
    """Compile a kernel, and keep it."""
    from ruvon.kernels.cpu.jit import build as builder  # imports numba, which takes a second

    code = builder.build(key, isa, symbol_of(key))
    store.write(name_of(key, isa), code)
    return code


class Compiled:
    """Addresses of kernels for one instruction set. Holds what keeps their code alive."""

    def __init__(self, isa: Isa, *, cores: int = 1) -> None:
        """With several ``cores``, what is sure to be needed is compiled by another process
        meanwhile, if it is not there: Python compiles one thing at a time."""
        self._isa = isa
        self._store = open_store()
        self._engine = empty_engine()
        self._addresses: dict[Key, int] = {}
        missing = [key for key in USUAL if name_of(key, isa) not in self._store]
        self._helper: subprocess.Popen[bytes] | None = None
        if missing and cores > 1 and self._store.folder and sys.executable:
            command = [sys.executable, "-m", __name__, isa.name, json.dumps(missing)]
            with suppress(OSError):  # it is a convenience
                self._helper = subprocess.Popen(command, stdout=DEVNULL, stderr=DEVNULL)

    def address(self, key: Key) -> int:
        """Of the compiled kernel; loads or compiles it at first use."""
        if key not in self._addresses:
            self._addresses[key] = self._load(key)
        return self._addresses[key]

    def close(self) -> None:
        """End the process that still compiles; what it has kept is whole."""
        if self._helper is not None:
            self._helper.terminate()
            self._helper.wait()
            self._helper = None

    def _load(self, key: Key) -> int:
        if key in USUAL and self._helper is not None:
            self._helper.wait()  # if it came to nothing, the kernel is compiled here
            self._helper = None
        code = self._store.read(name_of(key, self._isa)) or build(key, self._isa, self._store)
        self._engine.add_object_file(binding.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        return int(self._engine.get_function_address(symbol_of(key)))


def empty_engine() -> binding.ExecutionEngine:
    """What puts object files into memory, with nothing in it yet."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine(jit=True)
    module = ir.Module()
    module.triple = binding.get_process_triple()
    return binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)


def main(isa: str, keys: str) -> None:
    """Compile kernels and keep them; ``keys`` are JSON."""
    store = open_store()
    for name, kind in json.loads(keys):
        build((name, kind), choose(isa), store)


if __name__ == "__main__":
    main(*sys.argv[1:])
