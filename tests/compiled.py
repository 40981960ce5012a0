"""Scripts about compiled Triton kernels, in a process without the interpreter that tests use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LONGEST = 100  # seconds


def run_compiled(script: Path, *arguments: str) -> Any:
    """What the script prints, read as JSON; fails with what it wrote to stderr if it does."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environ | {"PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
