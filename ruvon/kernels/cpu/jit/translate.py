"""numba as a translator from Python to LLVM's language, and nothing else.

numba makes machine code of every function as soon as it has seen it, for this CPU, with an entry
for Python, and optimizes each by itself. Kernels are compiled whole, later, perhaps for another
CPU: so what numba would run is left out here, which is also most of the time it would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numba
from numba import _dynfunc, types
from numba.core.codegen import AOTCPUCodegen
from numba.core.compiler_lock import global_compiler_lock
from numba.core.config import _OptLevel
from numba.core.cpu import CPUContext
from numba.core.registry import CPUDispatcher, CPUTarget
from numba.core.target_extension import (
    CPU,
    dispatcher_registry,
    jit_registry,
    target_registry,
)

OPTIONS = {
    "nopython": True,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


class Language(CPU):  # type: ignore[misc]
    """LLVM's language as a target of numba's, with all that it can do for CPUs."""


class Context(CPUContext):  # type: ignore[misc]
    """numba's own, less its code generator."""

    def init(self) -> None:
        super().init()
        self._internal_codegen = AOTCPUCodegen("ruvon")

    def get_executable(self, library: Any, description: Any, environment: Any) -> Any:
        """What stands for the function among those that call it; it cannot be run."""
        module, name = description.lookup_module(), description.qualname
        return _dynfunc.make_function(module, name, "", 0, environment, (library,))


class Target(CPUTarget):  # type: ignore[misc]
    @cached_property
    def _toplevel_target_context(self) -> Context:
        return Context(self.typing_context, self._target_name)


class Function(CPUDispatcher):  # type: ignore[misc]
    targetdescr = Target("llvm")


def helper(function: Callable[..., Any] | None = None, **_options: Any) -> Any:
    """A function that kernels may call. numba asks for what it has itself with options."""
    if function is None:
        return helper
    return Function(py_func=function, locals={}, targetoptions=OPTIONS)


target_registry["llvm"] = Language
dispatcher_registry[Language] = Function
jit_registry[Language] = helper


def translate(function: Callable[..., None], signature: types.Type) -> tuple[str, str]:
    """A kernel and all it calls as LLVM's text, and the name it has there."""
    made = helper(function)
    with unoptimized():
        made.compile(signature)
        (result,) = made.overloads.values()
        with global_compiler_lock:
            result.library.finalize()  # brings in all that is called
    return result.library.get_llvm_str(), result.fndesc.llvm_func_name


@contextmanager
def unoptimized() -> Iterator[None]:
    """numba asks a global setting how hard to try: set it while it looks, then put it back."""
    before: Any = numba.config.OPT
    numba.config.OPT = _OptLevel(0)
    try:
        yield
    finally:
        numba.config.OPT = before
