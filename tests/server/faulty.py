"""``ruvon serve`` over a fake model that does what a prompt says: a program for tests of faults.

python faulty.py [FLAGS OF ruvon serve]
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from serving import ScriptRunner, fake_start

from ruvon.cli import main
from ruvon.config import EngineConfig
from ruvon.engine.types import Plan, StepResult
from ruvon.server import app, watchdog


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_memory() -> None:
    raise MemoryError


def broken() -> None:
    raise RuntimeError("an operator failed")


def hold_loop() -> None:
    time.sleep(1000)


def hold_lock() -> None:
    ctypes.PyDLL(None).sleep(1000)  # a PyDLL's functions keep the interpreter's lock


FAULTS: Mapping[str, Callable[[], None]] = {
    "out of memory": out_of_memory,
    "no memory": no_memory,
    "broken": broken,
    "hold the loop": hold_loop,
    "hold the lock": hold_lock,
}


class FaultyRunner(ScriptRunner):
    """Has a fault where a new sequence's prompt names one; ``hang`` is a step without end, ``lost``
    a device that is."""

    def launch(self, plan: Plan) -> Future[StepResult]:
        prompts = [
            bytes(token for token in chunk.tokens if 0 < token < 256).decode()
            for chunk in plan.chunks
        ]
        if "hang" in prompts:
            return Future()
        self.lost = "lost" in prompts
        self.broken = RuntimeError("the device is gone") if self.lost else None
        for prompt in prompts:
            if prompt in FAULTS:
                self.plans.append(plan)  # as one that was launched and failed
                return self._fault(plan, FAULTS[prompt])
        return super().launch(plan)

    def _fault(self, plan: Plan, fault: Callable[[], None]) -> Future[StepResult]:
        self.failing[plan.step] = "run"
        self.plans.pop()
        future = super().launch(plan)
        assert future.exception() is not None
        fault()  # raises what the engine takes for the step's error
        return future


if __name__ == "__main__":
    app.start_engine = fake_start(FaultyRunner("fine"), EngineConfig())
    app.start_for_good = app.start_engine
    watchdog.GOODBYE = 0.5
    watchdog.LOCKED = 0.5
    sys.exit(main(["serve", *sys.argv[1:]]))
