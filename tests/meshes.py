"""Ranks that are threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch.distributed as dist

from ruvon.kernels.mesh import Mesh, process_group_mesh

T = TypeVar("T")


def on_ranks(size: int, stages: int, work: Callable[[Mesh], T]) -> list[T]:
    """What ``work`` returns on every rank of a grid, stage by stage. None leaves before all are
    done, but when one fails."""
    store, done = dist.HashStore(), Barrier(size * stages)

    def one(number: int) -> T:
        stage, rank = divmod(number, size)
        mesh = process_group_mesh(store, rank=rank, size=size, stage=stage, stages=stages)
        try:
            result = work(mesh)
            done.wait(60)
            return result
        finally:
            mesh.close()

    with ThreadPoolExecutor(size * stages) as threads:
        return [*threads.map(one, range(size * stages))]
