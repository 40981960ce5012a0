"""What the outside sees: names, versions, documents."""

import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import make_flags
import pytest

import ruvon

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(
    path for folder in ("ruvon", "bench", "scripts") for path in (ROOT / folder).rglob("*.py")
    if ".peers" not in path.parts
)  # fmt: skip


def test_public_names():
    assert set(ruvon.__all__) <= set(dir(ruvon))
    assert all(getattr(ruvon, name) is not None for name in ruvon.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ruvon.no_such_name


def test_importing_ruvon_does_not_import_torch():
    code = "import sys, ruvon; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    released = re.search(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released is not None
    assert ruvon.__version__ == project["version"] == released[1]


def test_the_reference_of_settings_is_current():
    assert make_flags.PATH.read_text() == make_flags.render(), "run make docs"


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    needed = [*project["dependencies"], *chain.from_iterable(extras)]
    pinned = {
        normal(line.split("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    names = {normal(re.match(r"[\w.-]+", need)[0]) for need in needed}
    assert names - pinned <= {"triton"}, "triton's version is torch's choice"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_left_overs(path: Path):
    text = path.read_text()
    for pattern in (r"\b(TODO|FIXME|XXX)\b", r"\bbreakpoint\(", r"\bpdb\b", r"/(home|root|Users)/"):
        assert not re.search(pattern, text), f"{pattern} in {path}"
