"""Ranks that are processes, with a GPU each."""

from __future__ import annotations

import faulthandler
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as processes

LONGEST = 120  # seconds, after which a process says where it is and ends


def on_cards(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run ``work(rank, *arguments)`` in ``size`` processes, whose current device is their own GPU.
    Raises when one of them has failed, and ends the others, which may wait for it."""
    context = processes.spawn(_one, (work, arguments), nprocs=size, join=False)
    assert context is not None
    try:
        while not context.join():
            pass
    finally:
        for process in context.processes:
            process.kill()


def _one(rank: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Ends at once, for what NCCL and graphs hold cannot be let go of while others wait."""
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    try:
        torch.cuda.set_device(rank)
        work(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
