"""``ruvon serve`` over a fake model that does what a prompt says: a program for tests of faults.

python faulty.py [FLAGS OF ruvon serve]
"""

from __future__ import annotations

import ctypes
import sys
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

FAULTS: Mapping[str, Callable[[], object]] = {
    "torch's memory": lambda: torch.empty(1 << 50),
    "memory": lambda: bytearray(1 << 60),
    "operator": lambda: torch.zeros(3) @ torch.zeros(4),
    "lock": lambda: ctypes.PyDLL(None).sleep(1000),  # a PyDLL keeps the interpreter's lock
}
"""What a step does for a prompt, before it is launched."""


class FaultyRunner(ScriptRunner):
    """Has a fault where a prompt names one; ``hang`` is a step without end."""

    def launch(self, plan: Plan) -> Future[StepResult]:
        prompts = [
            bytes(token for token in chunk.tokens if 0 < token < 256).decode()
            for chunk in plan.chunks
        ]
        if "hang" in prompts:
            return Future()
        faults = [FAULTS[prompt] for prompt in prompts if prompt in FAULTS]
        if faults:
            self.failing[plan.step] = "run"
        future = super().launch(plan)
        for fault in faults:
            fault()
        return future


if __name__ == "__main__":
    app.start_for_good = fake_start(FaultyRunner("fine"), EngineConfig())
    watchdog.GOODBYE = 0.5
    watchdog.LOCKED = 5
    sys.exit(main(["serve", *sys.argv[1:]]))
