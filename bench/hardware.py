"""What numbers depend on before any program does: the processor and its memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

# Names of clouds' processors say little. Generation by family, then by ranges of models.
ZEN = {
    23: {"Zen 2": ((0x30, 0x4F), (0x60, 0x7F), (0x90, 0x91), (0xA0, 0xAF)), "Zen": ((0, 0xFF),)},
    25: {"Zen 3": ((0x00, 0x0F), (0x20, 0x5F)), "Zen 4": ((0x10, 0x1F), (0x60, 0xAF))},
    26: {"Zen 5": ((0x00, 0x4F), (0x60, 0x7F)), "Zen 6": ((0x50, 0x5F), (0x80, 0xCF))},
}
VECTORS = {
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX2 VNNI",
    "avx2": "AVX2",
    "i8mm": "NEON i8mm",
    "asimddp": "NEON dot product",
}
"""Flags of the kernel's, the best first."""


def cpu_name(cpuinfo: str | None = None) -> str:
    """``AMD EPYC (Zen 3, AVX2)``, from the text of /proc/cpuinfo."""
    lines = (Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo).splitlines()
    pairs = (line.partition(":") for line in reversed(lines))  # the first processor's win
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    flags = (fields.get("flags") or fields.get("Features", "")).split()
    vectors = next((name for flag, name in VECTORS.items() if flag in flags), "")
    details = ", ".join(filter(None, (generation(fields), vectors)))
    name = fields.get("model name", "processor")
    return f"{name} ({details})" if details else name


def generation(fields: dict[str, str]) -> str:
    if not {"cpu family", "model"} <= fields.keys():
        return ""
    family, model = int(fields["cpu family"]), int(fields["model"])
    names = ZEN.get(family, {}) if fields.get("vendor_id") == "AuthenticAMD" else {}
    found = (name for name, ranges in names.items() if within(model, ranges))
    return next(found, f"family {family}, model {model}")


def within(number: int, ranges: Iterable[tuple[int, int]]) -> bool:
    return any(first <= number <= last for first, last in ranges)


def read_bandwidth(num_bytes: int = 1 << 28, seconds: float = 1.0) -> float:
    """Gigabytes a second that all processors together read, at best."""
    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(num_bytes // 8), threads)
    best, end = float("inf"), time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < end:
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - began)
    return num_bytes / best / 1e9
