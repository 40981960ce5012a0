"""Importing a server, which is most of the time that one takes to start.

Two thirds of it are torch, a fifth of that the mapping of its libraries: their operations register
themselves. `import` holds the interpreter's lock meanwhile, a call by ctypes lets go of it. So what
needs no torch is imported beside that, and finds a second core.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

NATIVE = (
    "aiohttp.web", "csv", "markupsafe", "numpy", "orjson", "prometheus_client", "pydantic.types",
    "structlog", "uvloop",
)  # fmt: skip
"""What has libraries of its own, or asks the system for functions of theirs when it is first used,
as pydantic does: it would wait until torch's are mapped, so it comes first."""

PURE = (
    "jinja2.sandbox",
    "ruvon.engine.engine",
    "ruvon.server.parsing",
    "ruvon.server.responses_api.schemas",
    "ruvon.server.messages_api.schemas",
    "ruvon.server.writers",
    "ruvon.server.middleware",
)
"""What is Python from there on, for nearly as long as torch's libraries take (0.3 s)."""


@contextmanager
def importing() -> Iterator[None]:
    """Around imports that take seconds.

    Ctrl-C ends the process at once there: as an exception it would reach modules written in C that
    make an ImportError of it, or pass it over. And imports make much and drop little, so that the
    garbage collector takes a seventh of the time for nothing. What they made stays: the first
    collection afterwards would look through all of it.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # nohup and its like ignore it, and so it stays
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # for libraries that then look whether they left something
        gc.enable()
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def import_beside_torch() -> None:
    """Import what of a server needs no torch, and map torch's libraries meanwhile."""
    import_all(NATIVE)
    Thread(target=map_torch, name="ruvon-map").start()  # `import torch` waits for it
    import_all(PURE)


def import_all(names: Iterable[str]) -> None:
    for name in names:
        import_module(name)


def map_torch() -> None:
    """As `import torch` will, which says what is wrong where this comes to nothing. A build for
    GPUs finds its libraries in several packages, and its own way to them."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return
    folder = Path(spec.origin).parent / "lib"
    library = folder / "libtorch.so"  # what it has that knows no Python
    if library.exists() and not (folder / "libtorch_cuda.so").exists():
        ctypes.CDLL(None).dlopen(os.fsencode(library), os.RTLD_NOW)
