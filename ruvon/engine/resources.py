"""What this process may use of the machine it runs on: memory and cores, containers included.

Both versions of Linux's control groups keep their limits in small files. Inside a container they
lie at the mount point; outside, at the path that /proc tells and in all folders above it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ruvon.errors import ConfigError

ROOT = Path("/")
NO_LIMIT = 1 << 60  # version 1 writes "unlimited" as a huge number


def available_memory(root: Path = ROOT) -> int:
    """Bytes of main memory that may still be taken."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():  # not Linux, and nothing portable tells what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    kilobytes = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())
    assert kilobytes is not None, "every Linux since 3.14 has it"
    rooms = (int(kilobytes[1]) * 1024, *_rooms(root), *_own_rooms(root), NO_LIMIT)
    return max(min(rooms), 0)


def available_cores(root: Path = ROOT) -> int:
    """Cores this process may keep busy: those it may run on, or fewer if its time is limited."""
    return max(math.ceil(min([len(cores(root)), *_core_shares(root)])), 1)


def cores(root: Path = ROOT) -> list[int]:
    """The first CPU of each core this process may run on. A core's other ones (SMT) share its
    arithmetic units, which one thread of ours keeps busy."""
    first: dict[str, int] = {}
    for cpu in allowed_cpus():
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        first.setdefault(_read(topology / "thread_siblings_list") or str(cpu), cpu)
    return list(first.values())


def allowed_cpus() -> list[int]:
    """The CPUs this process may run on, as `taskset` or a container's cpuset leaves them."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores_to_pin(
    threads: int, wanted: Literal["auto", "on", "off"], root: Path = ROOT
) -> list[int] | None:
    """A core for each compute thread to stay on; None where the system shall place them.

    ``auto`` pins where the threads fill the cores that this process may run on: left alone, two of
    them meet on one core again and again, and wait for each other. Where they do not fill them, as
    under a limit of time, the next process might choose the same ones, and others would lie idle.

    Raises ConfigError for ``on`` where that cannot be.
    """
    own = cores(root)
    if wanted == "on" and not (hasattr(os, "sched_setaffinity") and threads <= len(own)):
        raise ConfigError(
            f"--pin-threads on: {threads} threads cannot each have one of {len(own)} cores here"
        )
    fills = threads == len(own) and hasattr(os, "sched_setaffinity")
    return own[:threads] if wanted == "on" or (wanted == "auto" and fills) else None


OWN_LIMITS = {"Max address space": "VmSize", "Max data size": "VmData"}
"""What ``ulimit -v`` and ``ulimit -d`` set, and what counts towards it."""


def _own_rooms(root: Path) -> Iterator[int]:
    """For each of those limits, the bytes left under it."""
    limits, status = (_read(root / "proc/self" / name) for name in ("limits", "status"))
    for limit_name, usage_name in OWN_LIMITS.items():
        limit = re.search(rf"^{limit_name} +(\d+) ", limits, re.MULTILINE)
        used = re.search(rf"^{usage_name}:\s+(\d+) kB", status, re.MULTILINE)
        if limit and used:
            yield int(limit[1]) - 1024 * int(used[1])


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
    own = [Path(path.strip("/")) for _, names, path in lines if _concerns(names, controller)]
    paths = dict.fromkeys([Path(), *(above for path in own for above in (path, *path.parents))])
    mounts = (root / "sys/fs/cgroup", root / "sys/fs/cgroup" / controller)
    return [mount / path for mount in mounts for path in paths]


def _concerns(names: str, controller: str) -> bool:
    """Version 2 has one hierarchy for all controllers, and writes no names."""
    return names == "" or controller in names.split(",")


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
