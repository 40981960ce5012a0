"""A small project that an agent is to mend, and a home of its own for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

BROKEN = "def add(a, b):\n    return a - b\n"
MENDED = "def add(a, b):\n    return a + b\n"
PATIENCE = 200  # seconds for one run of an agent


@dataclass
class Project:
    """``file`` is broken; ``home`` is where the agent may keep what it keeps."""

    folder: Path
    home: Path

    @property
    def file(self) -> Path:
        return self.folder / "calc.py"

    @property
    def task(self) -> str:
        return f"Mend add in {self.file}"

    def run(self, *arguments: str, **environment: str) -> str:
        """Run the agent in the project; gives what it printed."""
        done = subprocess.run(
            [os.environ["RUVON_CLIENT"], *arguments], cwd=self.folder, timeout=PATIENCE,
            env=self._environment() | environment, stdin=subprocess.DEVNULL, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        print(done.stdout)
        assert done.returncode == 0, done.stdout[-500:]
        return done.stdout

    def _environment(self) -> dict[str, str]:
        home = str(self.home)
        kept = {k: os.environ[k] for k in ("PATH", "LANG", "SSL_CERT_FILE") if k in os.environ}
        xdg = {
            f"XDG_{kind}_HOME": f"{home}/{kind}" for kind in ("CONFIG", "DATA", "CACHE", "STATE")
        }
        return kept | xdg | {"HOME": home, "DO_NOT_TRACK": "1"}

    def assert_mended(self) -> None:
        assert self.file.read_text() == MENDED


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder, home = tmp_path / "project", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    (folder / "calc.py").write_text(BROKEN)
    me = ["-c", "user.name=Tester", "-c", "user.email=tester@example.com"]
    for command in (["init", "-q"], ["add", "."], [*me, "commit", "-qm", "Begin"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return Project(folder, home)


@pytest.fixture
def write(project: Project) -> Callable[[str, str], Path]:
    """``write(path, text)``: a file in the agent's home."""

    def work(path: str, text: str) -> Path:
        file = project.home / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return work
