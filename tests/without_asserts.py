"""A plugin for pytest: ruvon as ``python -O`` has it, without its asserts; those of tests stay.
Servers that tests start are run with ``-O``.

    PYTHONPATH=tests python -m pytest -p without_asserts tests/server

What passes without this and fails with it depends on an assert (vLLM CVE-2026-41523).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType


class Loader(SourceFileLoader):
    """Compiles without asserts, and keeps nothing."""

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        return compile(source, self.path, "exec", dont_inherit=True, optimize=1)


class Finder(MetaPathFinder):
    """Finds ruvon's modules where they are, for such a loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != "ruvon":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, Finder())


def pytest_runtest_setup() -> None:
    """Of what tests start from here on. Processes of tests are there by then."""
    os.environ["PYTHONOPTIMIZE"] = "1"
