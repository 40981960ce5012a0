"""Ranks that are processes, with a GPU each."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from ruvon.engine.ranks.process import device_environments
from ruvon.kernels.mesh import process_group_mesh

DEVICE = torch.device("cuda")  # of each process: its own, as the engine's ranks have theirs
LONGEST = 120  # seconds, after which a process says where it is and ends


def on_cards(
    size: int, folder: Path, work: Callable[..., None], *arguments: Any, in_order: bool = True
) -> None:
    """Run ``work(mesh, store, *arguments)`` in ``size`` processes, which meet over NCCL, and by a
    file in ``folder``. Raises when one has failed, and ends the others, which may wait for it."""
    context, processes = multiprocessing.get_context("spawn"), []
    for rank, environment in enumerate(device_environments(size, torch.cuda.device_count())):
        given = (rank, size, str(folder / "store"), in_order, work, arguments)
        processes.append(context.Process(target=_one, args=given))
        with patch.dict(os.environ, environment):  # read when the child first looks for its device
            processes[-1].start()
    try:
        running = {process.sentinel: process for process in processes}
        while running:
            for sentinel in wait([*running]):
                process = running.pop(sentinel)
                process.join()
                assert process.exitcode == 0, f"{process.name}: see its stderr"
    finally:
        for process in processes:
            process.kill()


def _one(
    rank: int,
    size: int,
    path: str,
    in_order: bool,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """Ends at once, for what NCCL and graphs hold cannot be let go of while others wait."""
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    try:
        store = dist.FileStore(path, size)
        mesh = process_group_mesh(store, rank=rank, size=size, device=DEVICE, in_order=in_order)
        work(mesh, store, *arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
