"""Work on several GPUs at once: a process each, which meet as a model's ranks do."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ruvon.engine.ranks.process import device_environments
from ruvon.kernels.memory_mesh import over_memory
from ruvon.kernels.mesh import ALONE, process_group_mesh

T = TypeVar("T")
DEVICE = torch.device("cuda")  # of each rank: its own


def on_cards(size: int, sums: str, work: Callable[..., T], *arguments: Any) -> T:
    """What ``work(mesh, *arguments)`` returns on the first of ``size`` ranks, whose ``sums`` go
    through "memory" where they fit, or over "nccl"."""
    if size == 1:
        return work(ALONE, *arguments)
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(), []
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        for rank, environment in enumerate(device_environments(size, torch.cuda.device_count())):
            os.environ.update(environment)  # read when the child first looks for its device
            given = (rank, size, store, sums, theirs[1], work, arguments)
            ours.append(context.Process(target=_one, args=given))
            ours[-1].start()
        theirs[1].close()
        try:
            result: T = theirs[0].recv()
        finally:
            for process in ours:
                process.join(30)
                process.kill()
    return result


def _one(
    rank: int,
    size: int,
    path: str,
    sums: str,
    answer: Connection,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    store = dist.FileStore(path, size)
    mesh = process_group_mesh(store, rank=rank, size=size, device=DEVICE, in_order=False)
    if sums == "memory":
        mesh = over_memory(mesh, store, DEVICE)
    result = work(mesh, *arguments)
    if rank == 0:
        answer.send(result)
    os._exit(0)  # graphs that hold NCCL's calls need not be taken apart
