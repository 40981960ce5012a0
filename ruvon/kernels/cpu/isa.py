"""Instruction sets: what the vector unit of a CPU can do, and which one kernels are compiled for.

What differs between them is how wide a register is, how many there are, and what multiplies bytes.
Integer sums are exact and all else is done lane by lane in one order, so a product has the same
bits under each of them; only ``bf16`` rounds activations where the others do not.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llvmlite import binding

from ruvon.errors import ConfigError

Dot = Literal["vpdpbusd", "maddubs", "usdot", "sdot", "plain"]
"""What multiplies bytes: x86's dot product of unsigned and signed bytes (VNNI), its product that
adds pairs into 16 bits, Arm's dot products of mixed (i8mm) and of signed bytes, or arithmetic that
any CPU has."""


@dataclass(frozen=True, slots=True)
class Isa:
    """One instruction set. `ISAS` lists those there are."""

    name: str
    width: int  # bytes of a vector register
    registers: int  # of these
    dot: Dot
    needs: tuple[str, ...] = ()  # LLVM's names of what the CPU must have
    bf16: bool = False  # it multiplies pairs of bfloat16
    machine: Literal["x86_64", "aarch64", "any"] = "x86_64"

    @property
    def rows(self) -> int:
        """Rows of activations that meet a tile at once: their sums, integer and float, and what
        they are made from fit the registers, or nearly so."""
        return 8 if self.width == 64 else 4

    def in_turn(self, rows: range) -> list[range]:
        """Rows to be computed together. Wide registers hold a group's codes while one row after
        another meets them; else a row's sums stay while codes come and go."""
        if self.width == 64 and self.dot == "vpdpbusd":
            return [range(row, row + 1) for row in rows]
        return [rows]


ISAS: tuple[Isa, ...] = (
    Isa("avx512-bf16", 64, 32, "vpdpbusd", ("avx512bw", "avx512vnni", "avx512bf16"), bf16=True),
    Isa("avx512-vnni", 64, 32, "vpdpbusd", ("avx512bw", "avx512vnni")),
    Isa("avx512", 64, 32, "maddubs", ("avx512bw",)),
    Isa("avx-vnni", 32, 16, "vpdpbusd", ("avx2", "fma", "f16c", "avxvnni")),
    Isa("avx2", 32, 16, "maddubs", ("avx2", "fma", "f16c")),
    Isa("i8mm", 16, 32, "usdot", ("i8mm",), machine="aarch64"),
    Isa("dotprod", 16, 32, "sdot", ("dotprod",), machine="aarch64"),
    Isa("portable", 16, 16, "plain", machine="any"),
)
"""The best one first. The index of one is what a kernel is told."""

HIDDEN = ("avx512", "avxvnni", "avx10", "amx", "evex512", "i8mm", "dotprod", "sve", "sme")
"""Beginnings of the names of features that a set must not use unless it needs them."""


def machine() -> str:
    """The architecture, under Linux's name for it."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


@functools.cache
def host_features() -> dict[str, bool]:
    """What the CPU has, by LLVM's names."""
    return dict(binding.get_host_cpu_features()) | arm_products()


LINUX_WORDS = {"dotprod": (16, 1 << 20), "i8mm": (26, 1 << 13)}
"""The type of the word in the auxiliary vector, AT_HWCAP or AT_HWCAP2, and the bit."""

MACOS_NAMES = {"dotprod": "hw.optional.arm.FEAT_DotProd", "i8mm": "hw.optional.arm.FEAT_I8MM"}


def arm_products() -> dict[str, bool]:
    """Which products of bytes an Arm CPU has: LLVM does not look for them."""
    if machine() == "aarch64" and sys.platform == "linux":
        word = ctypes.CDLL(None).getauxval
        word.argtypes, word.restype = [ctypes.c_ulong], ctypes.c_ulong
        return linux_products(word)
    if machine() == "aarch64" and sys.platform == "darwin":
        return {feature: macos_has(name) for feature, name in MACOS_NAMES.items()}
    return {}


def linux_products(word: Callable[[int], int]) -> dict[str, bool]:
    """``word`` gives the number of a type in the auxiliary vector."""
    return {name: bool(word(kind) & bit) for name, (kind, bit) in LINUX_WORDS.items()}


def macos_has(name: str) -> bool:
    value, size = ctypes.c_int32(0), ctypes.c_size_t(4)
    ctypes.CDLL(None).sysctlbyname(
        name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)
    )
    return value.value == 1  # a name that is not known leaves it as it was


def supported() -> list[Isa]:
    """Those that this CPU can run, the best one first."""
    has = host_features()
    return [
        isa
        for isa in ISAS
        if isa.machine in ("any", machine()) and all(has.get(name, False) for name in isa.needs)
    ]


def choose(name: str | None) -> Isa:
    """The instruction set of this name, or the best one here. Raises ConfigError if this CPU
    cannot run it."""
    known = supported()
    for isa in known:
        if name in (None, isa.name):
            return isa
    raise ConfigError(f"--cpu-isa {name}: this CPU has {', '.join(isa.name for isa in known)}")


def target_features(isa: Isa) -> str:
    """What LLVM may use, in its notation: what the CPU has, less what belongs to better sets."""
    hidden = () if isa.width == 64 or isa.machine == "any" else HIDDEN

    def sign(name: str, has: bool) -> str:
        return "+" if has and (name in isa.needs or not name.startswith(hidden)) else "-"

    return ",".join(sign(*each) + each[0] for each in sorted(host_features().items()))
