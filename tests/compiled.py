"""Scripts about compiled Triton kernels, in a process without the interpreter that tests use."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import forked


def run_compiled(script: Path, *arguments: str) -> Any:
    """What the script prints, read as JSON; fails with what it wrote if it does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    exit_code, text = forked.run([str(script), *arguments], environment)
    assert exit_code == 0, text
    return json.loads(text.splitlines()[-1])  # warnings come before
