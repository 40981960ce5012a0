"""Where on this machine each replica runs: cores or devices of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ruvon.config import EngineConfig
from ruvon.engine.resources import ROOT, available_cores, cores
from ruvon.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Place:
    """What one replica has for itself. Without ``cpus`` it may run on any."""

    cpus: tuple[int, ...] = ()
    threads: int = 0
    share: float = 1.0  # of the memory
    devices: tuple[str, ...] = ()  # as CUDA_VISIBLE_DEVICES names them


def places(
    config: EngineConfig,
    count: int,
    environ: Mapping[str, str] = os.environ,
    root: Path = ROOT,
) -> list[Place]:
    """As many places, which share nothing. Raises ConfigError where there are not enough."""
    devices = visible_devices(environ, root)
    if config.device == "cuda" or (config.device == "auto" and devices):
        each = config.num_ranks
        if len(devices) < count * each:
            raise ConfigError(
                f"--data-parallel-size {count} needs {count * each} GPUs, and there are "
                f"{len(devices)}"
            )
        firsts = range(0, count * each, each)
        return [Place(devices=tuple(devices[first : first + each])) for first in firsts]
    return core_places(count, root)


def visible_devices(environ: Mapping[str, str], root: Path) -> list[str]:
    """The GPUs that this process may use, found without asking the driver."""
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device.strip() for device in named.split(",") if device.strip()]
    files = root.glob("dev/nvidia[0-9]*")
    return sorted((file.name.removeprefix("nvidia") for file in files), key=int)


def core_places(count: int, root: Path) -> list[Place]:
    """The cores in equal shares of neighbours; the rest of a division stays free for the router."""
    own = cores(root)
    if len(own) < count:
        raise ConfigError(
            f"--data-parallel-size {count} needs a core for each replica, and there are {len(own)}"
        )
    size = len(own) // count
    threads = max(min(size, available_cores(root) // count), 1)
    shares = (own[number * size : (number + 1) * size] for number in range(count))
    return [Place(tuple(share), threads, 1 / count) for share in shares]
