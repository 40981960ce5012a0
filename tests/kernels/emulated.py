"""The CPU kernels on an emulated Arm CPU, for tests: compiled here (and kept, as all kernels are),
linked into a program, run on copies of the memory that their instructions point at.

An `Emulator` takes the places of `Compiled` and of `ThreadPool` in `CpuKernels`: what is computed
with those operations is then computed by Arm's instructions.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE
from typing import IO

import numpy as np
import torch

from ruvon.kernels.cpu.arguments import INSTRUCTION_BYTES, Header, Key
from ruvon.kernels.cpu.compiled import DIFFER_BY_ISA, open_store
from ruvon.kernels.cpu.isa import Isa
from ruvon.kernels.cpu.jit.build import assembly
from ruvon.kernels.cpu.layout import round_up
from ruvon.kernels.cpu.params import SCRATCH_BYTES

TRIPLE = "aarch64-unknown-linux-gnu"
QEMU, COMPILER = TOOLS = "qemu-aarch64", "aarch64-linux-gnu-gcc"
MISSING = [tool for tool in TOOLS if shutil.which(tool) is None]

CPUS = {"i8mm": "max", "dotprod": "neoverse-n1", "portable": "cortex-a72"}
"""By instruction set, what to emulate: the last two have nothing that belongs to a better set."""

PAGE = 4096
BASE = 1 << 32  # where memory lies in the emulated program

MAIN = """
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

typedef void kernel(int64_t *told, int64_t *params, int64_t start, int64_t stop, char *scratch);
kernel %(symbols)s;
static kernel *const kernels[] = {%(symbols)s};
static _Alignas(64) char scratch[%(scratch)d];

/* Runs some lines on memory that is its standard input: parameters, lines, and all else. */
int main(int argc, char **argv)
{
    size_t size = atoll(argv[1]), lines = atoll(argv[2]);
    int64_t *params = mmap((void *)%(base)d, size, PROT_READ | PROT_WRITE,
                           MAP_SHARED | MAP_FIXED, STDIN_FILENO, 0);
    int64_t *line = params + %(page)d / 8;
    if (params == MAP_FAILED)
        return 1;
    for (; lines--; line += %(words)d) {
        int64_t units = params[line[%(counted)d]] * line[%(units)d];
        kernels[line[%(kernel)d]](line + %(header)d, params, 0, units, scratch);
    }
    return 0;
}
"""
NUMBERS = {
    "scratch": SCRATCH_BYTES,
    "base": BASE,
    "page": PAGE,
    "words": INSTRUCTION_BYTES // 8,
    "header": len(Header._fields),
    **{name: number for number, name in enumerate(Header._fields)},
}


class Emulator:
    """Kernels for one instruction set, built in ``folder`` when they are first run."""

    threads = 1

    def __init__(self, isa: Isa, folder: Path) -> None:
        self._isa, self._folder = isa, folder
        self._store = open_store()
        self._keys: list[Key] = []

    def address(self, key: Key) -> int:
        """A number that stands for the kernel."""
        if key not in self._keys:
            self._keys.append(key)
        return self._keys.index(key)

    def run(self, program: torch.Tensor, params: list[int]) -> None:
        """What `ThreadPool.run` does."""
        lines = program.numpy().copy()
        kernels = lines[:, NUMBERS["kernel"]]
        used, kernels[:] = np.unique(kernels, return_inverse=True)
        executable = self._executable([self._keys[number] for number in used])
        segments, size = move(lines, PAGE + round_up(lines.nbytes, PAGE))
        path = self._folder / "memory"
        memory = np.memmap(path, np.uint8, "w+", shape=(size,))
        memory[: 8 * len(params)] = np.array(params, np.int64).view(np.uint8)
        memory[PAGE : PAGE + lines.nbytes] = lines.reshape(-1).view(np.uint8)
        for here, place, count in segments:
            ctypes.memmove(memory[place:].ctypes.data, here, count)
        with path.open("r+b") as file:
            run(CPUS[self._isa.name], executable, size, len(lines), stdin=file)
        for here, place, count in segments:
            ctypes.memmove(here, memory[place:].ctypes.data, count)

    def _executable(self, keys: list[Key]) -> Path:
        symbols = [f"{name}_{'' if kind is None else kind}" for name, kind in keys]
        path = self._folder / "-".join(symbols)
        if not path.exists():
            texts = [self._assembly(*each) for each in zip(keys, symbols, strict=True)]
            build(MAIN % {"symbols": ", ".join(symbols), **NUMBERS}, path, texts)
        return path

    def _assembly(self, key: Key, symbol: str) -> Path:
        own = key[0] in DIFFER_BY_ISA
        path = self._folder / f"{self._isa.name if own else 'arm'}-{symbol}.s"
        if not path.exists():
            text = self._store.read(path.name)
            if text is None:
                features = ",".join(f"+{name}" for name in self._isa.needs) if own else ""
                text = assembly(key, self._isa, symbol, TRIPLE, "generic", features).encode()
                self._store.write(path.name, text)
            path.write_bytes(text)
        return path


def build(source: str, path: Path, texts: Sequence[Path] = ()) -> None:
    """An executable from C and some assembly."""
    path.with_suffix(".c").write_text(source)
    flags = ["-static", "-Wa,-march=armv8.6-a", "-o", path]
    subprocess.run([COMPILER, *flags, path.with_suffix(".c"), *texts, "-lm"], check=True)


def run(cpu: str, executable: Path, *arguments: object, stdin: IO[bytes] | None = None) -> str:
    """What it prints. Raises CalledProcessError if it fails."""
    command = [QEMU, "-cpu", cpu, executable, *map(str, arguments)]
    return subprocess.run(command, stdin=stdin, stdout=PIPE, text=True, check=True).stdout


def move(lines: np.ndarray, start: int) -> tuple[list[tuple[int, int, int]], int]:
    """Make the addresses in ``lines`` those of copies of what they point at: behind each other from
    ``start`` on, as they lie in their pages here. Returns (address here, place there, bytes) of
    each copy, and where the last one ends."""
    pieces = living_memory()
    number = np.searchsorted(pieces[:, 0], lines, side="right") - 1
    inside = lines < pieces[number, 1]  # numbers below all addresses meet the last piece's end
    inside &= number >= 0
    segments = []
    for each in np.unique(number[inside]):
        first, end = pieces[each].tolist()
        place = start + first % PAGE
        lines[inside & (number == each)] += BASE + place - first
        segments.append((first, place, end - first))
        start = round_up(place + end - first, PAGE) + PAGE
    return segments, start


def living_memory() -> np.ndarray:
    """Where the memory of every tensor in this process begins and ends, in order."""
    things = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    tensors = [thing for thing in things if not thing.is_meta]  # those have no memory
    storages = [tensor.untyped_storage() for tensor in tensors]
    return np.array(sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages}))
