"""Shared fixtures. The stand-ins themselves are in `fakes`, which any test can import.

Torch, and what needs it, is imported in functions: the process that hands tests out to others reads
this file as well, and the others wait for it.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import torch
    from fakes import ByteTokenizer, FakeRunner

    from ruvon.engine.engine import Engine

if find_spec("triton") is None:  # it is not on every platform
    collect_ignore = ["engine/test_scoring.py", "engine/test_inputs.py"]
    collect_ignore_glob = ["engine/test_gpu_*.py", "kernels/test_triton_*.py"]

settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
if settings.get_current_profile_name() == "default":
    settings.load_profile("here")  # how fast a machine is fails no test


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """A million objects come, and stay until the end: nobody shall look for cycles among them."""
    if session.config.pluginmanager.has_plugin("dsession"):  # others collect
        return (yield)
    if not has_gpu():
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by whomever
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # for libraries that then look whether they left something


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long is not measured in this process, which would make it half as slow again: slow
    tests, whose servers are, and single kernels in Triton's interpreter, which whole models run."""
    among_others = "PYTEST_XDIST_WORKER" in os.environ
    for item in items:
        if among_others and item.get_closest_marker("alone"):
            item.add_marker(pytest.mark.skip("measures times, so it runs by itself"))
        if item.get_closest_marker("slow") or item.path.name.startswith("test_triton_"):
            item.add_marker(pytest.mark.no_cover)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """What tests multiply is small, and another process of theirs has the next core."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Commands that ran in this process have set up logging, which the next test finds as usual."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels run: on a GPU, or without one in the interpreter, on the CPU."""
    import torch

    if has_gpu():
        return torch.device("cuda")
    hasten(pytest.importorskip("triton.runtime.interpreter"))
    return torch.device("cpu")


def hasten(interpreter: ModuleType) -> None:
    """The interpreter puts its functions in place of the language's for every call, of functions in
    kernels too, and takes them back: most of its time. Here once for each module, and for good.
    And it looks whether integers overflow at each sum, which nothing does that is compiled."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    patch_lang, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    patched: set[str] = set()

    def patch_new(fn: Any) -> Any:
        if fn.__module__ not in patched:
            patched.add(fn.__module__)
            patch_lang(fn)
        return interpreter._LangPatchScope()  # nothing to take back

    def patch_index_too(tensor: Any, scope: Any) -> None:
        """Loop bounds are arrays of one element there, which numpy 2.4 makes no ints of."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang, interpreter._patch_lang_tensor = patch_new, patch_index_too


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    from fakes import ByteTokenizer

    return ByteTokenizer()


@pytest.fixture
def make_engine() -> Callable[..., Engine]:
    """An engine over a `FakeRunner`: ``make_engine(runner=None, num_blocks=64, **config)``."""

    def make(runner: FakeRunner | None = None, num_blocks: int = 64, **fields: Any) -> Engine:
        return fake_engine(runner, num_blocks, **fields)

    return make


def fake_engine(
    runner: FakeRunner | None = None,
    num_blocks: int = 64,
    *,
    max_model_len: int = 256,
    **fields: Any,
) -> Engine:
    from fakes import ByteTokenizer, FakeRunner

    from ruvon.config import EngineConfig
    from ruvon.engine.engine import Engine

    config = EngineConfig(**({"block_size": 16} | fields))
    runner = runner or FakeRunner(config.block_size)
    assert getattr(runner, "block_size", config.block_size) == config.block_size
    return Engine(
        runner,
        config,
        max_model_len=max_model_len,
        num_blocks=num_blocks,
        vocab_size=ByteTokenizer.vocab_size,
        eos_token_ids=ByteTokenizer.eos_ids,
    )
