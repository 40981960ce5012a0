"""What this process may use of the machine it runs on: memory and cores, containers included.

Both versions of Linux's control groups keep their limits in small files. Inside a container they
lie at the mount point; outside, at the path that /proc tells.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
NO_LIMIT = 1 << 60  # version 1 writes "unlimited" as a huge number


def available_memory(root: Path = ROOT) -> int:
    """Bytes of main memory that may still be taken."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # not Linux, and nothing portable tells what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    kilobytes = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())
    assert kilobytes is not None, "every Linux since 3.14 has it"
    return max(min(int(kilobytes[1]) * 1024, *_rooms(root), NO_LIMIT), 0)


def available_cores(root: Path = ROOT) -> int:
    """Cores this process may keep busy: those it may run on, or fewer if its time is limited."""
    pinned = hasattr(os, "sched_getaffinity")
    allowed = len(os.sched_getaffinity(0)) if pinned else os.cpu_count() or 1
    return max(math.ceil(min([allowed, *_core_shares(root)])), 1)


def _rooms(root: Path) -> Iterator[int]:
    """For each memory limit set on us, the bytes left under it. File pages that the kernel would
    drop before it killed anyone count as free."""
    for folder in _groups(root, "memory"):
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = _read(folder / limit_name)
            if limit in ("", "max") or int(limit) >= NO_LIMIT:
                continue
            stat = _read(folder / "memory.stat")
            droppable = re.search(r"^(?:total_)?inactive_file (\d+)", stat, re.MULTILINE)
            used = int(_read(folder / usage_name)) - int(droppable[1] if droppable else 0)
            yield int(limit) - used


def _core_shares(root: Path) -> Iterator[float]:
    """For each limit on our processor time, how many cores it amounts to."""
    for folder in _groups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota not in ("", "max", "-1"):
            yield int(quota) / int(period)


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders that may hold our limits for a controller."""
    lines = [line.split(":", 2) for line in _read(root / "proc/self/cgroup").splitlines()]
    paths = ["", *(path.strip("/") for _, names, path in lines if _concerns(names, controller))]
    mounts = (root / "sys/fs/cgroup", root / "sys/fs/cgroup" / controller)
    return [mount / path for mount in mounts for path in dict.fromkeys(paths)]


def _concerns(names: str, controller: str) -> bool:
    """Version 2 has one hierarchy for all controllers, and writes no names."""
    return names == "" or controller in names.split(",")


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
