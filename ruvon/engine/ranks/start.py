"""Starting ranks: all load at the same time, agree on how much cache there is, and are ready at the
same time or not at all."""

from __future__ import annotations

import dataclasses
import os
import selectors
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch

from ruvon.config import EngineConfig
from ruvon.engine.kv_cache import MemoryPlan
from ruvon.engine.ranks.channel import Kind
from ruvon.engine.ranks.messages import forward_log, join_memory, start_error
from ruvon.engine.ranks.process import (
    RankProcess,
    device_environments,
    share_cores,
    shares,
    start_process,
)
from ruvon.engine.ranks.ring import PlanRing, anonymous_memory
from ruvon.engine.ranks.runner import Ranks
from ruvon.engine.ranks.steps import RankError
from ruvon.errors import ConfigError
from ruvon.kernels.mesh import TIMEOUT
from ruvon.models.cache_groups import cache_groups
from ruvon.models.spec import ModelSpec
from ruvon.telemetry import Progress

GIVEN_TO_ALL = ("tensor_parallel_size", "pipeline_parallel_size", "threads", "model", "revision")
"""Settings that a rank has others for: it is one of several, and the model has been found."""


@dataclass(frozen=True, slots=True)
class StartedRanks:
    """Ranks that are ready, and what they have said of themselves."""

    runner: Ranks
    memory: MemoryPlan  # of all ranks together
    device: str
    kernels: str
    dtype: str
    batch_invariant: bool


def start_ranks(
    spec: ModelSpec, config: EngineConfig, path: Path, threads: int, progress: Progress
) -> StartedRanks:
    """Start a process for each rank, and load what lies at ``path``. ``threads`` are those of all.

    Raises ConfigError and LoadError as `start_engine` does, naming the rank, and RankError if one
    ends before it is ready.
    """
    count = config.num_ranks
    check_possible(config)
    with ExitStack() as undo:
        ring = PlanRing(count)
        undo.callback(ring.close)
        processes = spawn(config, undo)
        for setup, each in zip(setups(config, path, threads), processes, strict=True):
            each.channel.send(Kind.SETUP, orjson.dumps(setup), fds=(ring.fd,))
        shown = [(0, "starting ranks", 0.0)] * count
        said = hear_all(processes, Kind.LOADED, shown, progress)
        windows = tuple(group.window for group in cache_groups(spec))
        memory = join_memory(said, config.block_size, windows)
        agreed = {"num_blocks": memory.num_blocks, "max_model_len": memory.max_model_len}
        for each in processes:
            each.channel.send_json(Kind.CACHE, agreed)
        ready = hear_all(processes, Kind.READY, shown, progress)
        undo.pop_all()
    first = ready[0]
    return StartedRanks(
        Ranks(processes, ring, config.tensor_parallel_size, ready),
        memory,
        first["device"],
        first["kernels"],
        first["dtype"],
        all(said["batch_invariant"] for said in ready),
    )


def check_possible(config: EngineConfig) -> None:
    """Raises ConfigError where there cannot be several ranks."""
    if sys.platform != "linux":
        raise ConfigError("--tensor-parallel-size: several ranks need Linux")
    if config.device == "cuda" and not torch.distributed.is_nccl_available():
        raise ConfigError("--tensor-parallel-size: torch has no NCCL here")


def spawn(config: EngineConfig, undo: ExitStack) -> list[RankProcess]:
    """The processes; ``undo`` learns how to end them."""
    count, processes = config.num_ranks, []
    environments: Sequence[Mapping[str, str]] = [{}] * count
    if config.device == "cuda":
        environments = device_environments(count, torch.cuda.device_count())
    store = anonymous_memory(0)
    try:
        for rank in range(count):
            each = start_process(rank, store, environments[rank])
            undo.callback(each.close)
            undo.callback(each.end, 0.0)
            processes.append(each)
    finally:
        os.close(store)
    return processes


def setups(config: EngineConfig, path: Path, threads: int) -> list[dict[str, Any]]:
    """What each rank is told, as JSON."""
    count = config.num_ranks
    cores = share_cores(count, threads) if config.pin_threads != "off" else None
    given = dataclasses.asdict(config)
    for name in GIVEN_TO_ALL:
        del given[name]
    return [
        {
            "rank": rank,
            "size": config.tensor_parallel_size,
            "stages": config.pipeline_parallel_size,
            "config": {**given, "model": str(path), "threads": max(share, 1)},
            "cores": cores and cores[rank],
            "sharers": count,
            "timeout": TIMEOUT.total_seconds(),
        }
        for rank, share in enumerate(shares(threads, count))
    ]


def hear_all(
    processes: Sequence[RankProcess],
    kind: Kind,
    shown: list[tuple[int, str, float]],
    progress: Progress,
) -> list[Mapping[str, Any]]:
    """What each has to say of this kind, once all have. ``shown`` is how far each is: in its how
    manieth phase, which, and the share done of that; ``progress`` is shown that of all."""
    said: dict[int, Mapping[str, Any]] = {}
    with selectors.DefaultSelector() as selector:
        for each in processes:
            selector.register(each.channel, selectors.EVENT_READ, each)
        while len(said) < len(processes):
            for key, _ in selector.select():
                each = key.data
                try:
                    frames = each.channel.available()
                except EOFError:
                    raise RankError(f"{each.name} {each.fate()} while it started") from None
                for frame in frames:
                    if frame.kind == Kind.FATAL:
                        raise start_error(each.rank, frame.json)
                    if frame.kind == Kind.LOG:
                        forward_log(each.rank, frame.json)
                    elif frame.kind == Kind.PROGRESS:
                        count, latest, _ = shown[each.rank]
                        phase, share = frame.json
                        shown[each.rank] = (count + (phase != latest), phase, share)
                        progress(*slowest(shown))
                    elif frame.kind == kind:
                        said[each.rank] = frame.json
    return [said[rank] for rank in range(len(processes))]


def slowest(shown: Sequence[tuple[int, str, float]]) -> tuple[str, float]:
    """One bar for all: the phase of the rank that has come through the fewest, and how far ranks
    are in it on average."""
    fewest, phase, _ = min(shown)
    done = [share if count == fewest else 1.0 for count, _, share in shown]
    return phase, sum(done) / len(done)
