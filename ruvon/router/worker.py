"""A replica as a process of its own: ``python -m ruvon.router.worker``, started by its router.

Its settings come as JSON on the first line of stdin, so that keys are in nobody's list of
processes. Its router holds the other end: when that ends, so does the replica.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

import orjson

from ruvon.config import EngineConfig, ServerConfig
from ruvon.server.imports import import_beside_torch, importing


def main() -> None:
    """Serve as told, on the cores told: what computes counts them when it is imported."""
    told = orjson.loads(sys.stdin.buffer.readline())
    if told["cpus"]:
        os.sched_setaffinity(0, told["cpus"])
    threading.Thread(target=end_with_router, daemon=True).start()
    with importing():
        import_beside_torch()
        from ruvon.server.app import serve

    secret = told["secret"] and bytes.fromhex(told["secret"])
    serve(EngineConfig(**told["engine"]), ServerConfig(**with_tuples(told["server"])), secret)


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def end_with_router() -> None:
    """Wait until the router is gone, then leave as after SIGTERM."""
    while os.read(sys.stdin.fileno(), 4096):  # without a lock, which would outlive the interpreter
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
