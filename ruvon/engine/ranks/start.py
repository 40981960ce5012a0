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
from ruvon.engine.ranks.channel import Frame, Kind
from ruvon.engine.ranks.messages import forward_log, join_memory, start_error
from ruvon.engine.ranks.nodes import (
    NodeLink,
    Rendezvous,
    accept_nodes,
    listen,
    open_store,
    ranks_of_node,
)
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
from ruvon.kernels.mesh import ADDRESS, TIMEOUT, Mesh
from ruvon.models.cache_groups import cache_groups
from ruvon.models.shares import share_of
from ruvon.models.spec import ModelSpec
from ruvon.telemetry import Progress

GIVEN_TO_ALL = (
    "tensor_parallel_size", "pipeline_parallel_size", "threads", "model", "revision", "nnodes",
    "node_rank", "master_addr", "master_port", "cluster_key",
)  # fmt: skip
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
    check_possible(config)
    share_of(spec, Mesh(size=config.tensor_parallel_size, stages=config.pipeline_parallel_size))
    with ExitStack() as undo:
        here = ranks_of_node(config, 0)
        ring = PlanRing(len(here))
        undo.callback(ring.close)
        listener = listen(config, undo) if config.nnodes > 1 else None
        meeting = open_store(config) if listener else None
        links: list[RankProcess | NodeLink] = [*(local := spawn(config, here, undo))]
        set_up(local, config, path, threads, meeting, ring)
        if listener and meeting:
            links += accept_nodes(config, listener, (meeting.host, meeting.port), progress, undo)
            listener.close()
        shown = dict.fromkeys(range(config.num_ranks), (0, "starting ranks", 0.0))
        said = hear_all(links, Kind.LOADED, shown, progress)
        windows = tuple(group.window for group in cache_groups(spec))
        memory = join_memory(said, config.block_size, windows)
        agreed = {"num_blocks": memory.num_blocks, "max_model_len": memory.max_model_len}
        for link in links:
            link.send(Kind.CACHE, orjson.dumps(agreed))
        ready = hear_all(links, Kind.READY, shown, progress)
        undo.pop_all()
    first = ready[0]
    return StartedRanks(
        Ranks(links, ring, config.tensor_parallel_size, ready, meeting),
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


def spawn(config: EngineConfig, ranks: range, undo: ExitStack) -> list[RankProcess]:
    """The processes of this machine; ``undo`` learns how to end them."""
    processes = []
    environments: Sequence[Mapping[str, str]] = [{}] * len(ranks)
    if config.device == "cuda":
        environments = device_environments(len(ranks), torch.cuda.device_count())
    store = anonymous_memory(0)
    try:
        for rank, environment in zip(ranks, environments, strict=True):
            each = start_process(rank, store, environment)
            undo.callback(each.close)
            undo.callback(each.end, 0.0)
            processes.append(each)
    finally:
        os.close(store)
    return processes


def set_up(
    processes: Sequence[RankProcess],
    config: EngineConfig,
    path: Path,
    threads: int,
    meeting: Rendezvous | None,
    ring: PlanRing,
) -> None:
    """Tell each rank of this machine what it is to do. ``meeting`` is where it finds the others, if
    some are elsewhere."""
    count = len(processes)
    cores = share_cores(count, threads) if config.pin_threads != "off" else None
    given = dataclasses.asdict(config)
    for name in GIVEN_TO_ALL:
        del given[name]
    for place, (each, share) in enumerate(zip(processes, shares(threads, count), strict=True)):
        setup = {
            "size": config.tensor_parallel_size,
            "stages": config.pipeline_parallel_size,
            "config": {**given, "model": str(path), "threads": max(share, 1)},
            "place": place,  # among the ranks of this machine
            "sharers": count,
            "cores": cores and cores[place],
            "host": meeting and meeting.host,
            "port": meeting and meeting.port,
            "address": ADDRESS if meeting is None else meeting.address,
            "timeout": TIMEOUT.total_seconds(),
        }
        each.channel.send(Kind.SETUP, orjson.dumps(setup), fds=(ring.fd,))


def hear_all(
    links: Sequence[RankProcess | NodeLink],
    kind: Kind,
    shown: dict[int, tuple[int, str, float]],
    progress: Progress,
) -> list[Mapping[str, Any]]:
    """What each rank has to say of this kind, once all have. ``shown`` is how far each is: in its
    how manieth phase, which, and the share done of that; ``progress`` is shown that of all."""
    said: dict[int, Mapping[str, Any]] = {}
    with selectors.DefaultSelector() as selector:
        for link in links:
            selector.register(link.channel, selectors.EVENT_READ, link)
        while len(said) < len(shown):
            for key, _ in selector.select():
                for frame in hear(key.data):
                    if frame.kind == Kind.LOG:
                        forward_log(frame.rank, frame.json)
                    elif frame.kind == Kind.PROGRESS:
                        count, latest, _ = shown[frame.rank]
                        phase, share = frame.json
                        shown[frame.rank] = (count + (phase != latest), phase, share)
                        progress(*slowest(list(shown.values())))
                    elif frame.kind == kind:
                        said[frame.rank] = frame.json
    return [said[rank] for rank in range(len(said))]


def hear(link: RankProcess | NodeLink) -> list[Frame]:
    """What has come from there. Raises what ended a rank."""
    try:
        frames = link.channel.available()
    except EOFError:
        raise RankError(f"{link.name} {link.fate()} while it started") from None
    for frame in frames:
        if frame.kind == Kind.FATAL:
            raise start_error(frame.rank, frame.json)
        if frame.kind == Kind.GONE:
            raise RankError(f"rank {frame.rank} {frame.json} while it started")
    return frames


def slowest(shown: Sequence[tuple[int, str, float]]) -> tuple[str, float]:
    """One bar for all: the phase of the rank that has come through the fewest, and how far ranks
    are in it on average."""
    fewest, phase, _ = min(shown)
    done = [share if count == fewest else 1.0 for count, _, share in shown]
    return phase, sum(done) / len(done)
