"""Documents say what is so: fragments are the source's, names lie where a link says they do."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import fragments
import pytest
import tour
from embedded import needs_model

from ruvon.config import EngineConfig
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.tokenizer import load_tokenizer
from ruvon.telemetry import silent

ROOT = Path(__file__).parent.parent
SERIES = sorted((ROOT / "docs" / "series").glob("*.md"))
CODE = "docs/series/code/*.py"
FILES = [
    f"/{file.relative_to(ROOT).as_posix()}"
    for pattern in ("ruvon/**/*.py", "tests/**/*.py", "bench/*.py", "scripts/**/*.py", CODE)
    for file in ROOT.glob(pattern)
]

PLACED = re.compile(r"`([A-Za-z_][\w.]*)`\s+(?:in\s+|\()\[`?([\w/.]+\.py)`?\]\(([^)]+)\)")
"""A name and the file it is said to be in: `name` in [file](link), or `name` ([file](link))."""


def by_name(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", fragments.DOCUMENTS, ids=by_name)
def test_fragments_are_the_source_as_it_is(path: Path):
    text = path.read_text()
    assert fragments.refreshed(text) == text, "run make docs"


@pytest.mark.parametrize("path", SERIES, ids=by_name)
def test_no_part_shows_code_of_its_own_making(path: Path):
    """What is Python is included from the source, or is run by a test."""
    shown = re.findall(r"^(.*)\n```python\n(.*)", path.read_text(), re.MULTILINE)
    assert all(before.startswith("<!-- source:") or line[:4] == ">>> " for before, line in shown)


@pytest.mark.parametrize("path", fragments.DOCUMENTS, ids=by_name)
def test_names_are_defined_where_documents_say(path: Path):
    for name, _, link in PLACED.findall(path.read_text()):
        fragments.span((path.parent / link).read_text(), name)


@pytest.mark.parametrize("path", [*SERIES, ROOT / "CONTRIBUTING.md"], ids=by_name)
def test_files_that_are_named_exist(path: Path):
    for name in re.findall(r"`([\w/]+\.py)`", path.read_text()):
        assert any(file.endswith("/" + name) for file in FILES), f"there is no {name}"


def test_a_definition_is_found_with_its_decorators():
    source = "X: int = 1\n\n\n@one\n@two\nclass A:\n    async def f(self):\n        pass\n"
    assert fragments.definition(source, "X") == "X: int = 1"
    assert fragments.definition(source, "A").startswith("@one\n@two\nclass A:")
    assert fragments.definition(source, "A.f") == "async def f(self):\n    pass"
    with pytest.raises(LookupError, match=r"A\.g"):
        fragments.definition(source, "A.g")


@needs_model
def test_sessions_in_documents_show_what_they_give():
    tokenizer = load_tokenizer(open_checkpoint(EngineConfig(), silent))
    runner, parser = doctest.DocTestRunner(), doctest.DocTestParser()
    for path in SERIES:
        text = re.sub(r"^```$", "", path.read_text(), flags=re.MULTILINE)
        session = parser.get_doctest(text, {"tokenizer": tokenizer}, path.name, str(path), 0)
        runner.run(session)
    assert runner.tries >= 2
    assert runner.failures == 0


def test_the_tour_takes_an_evening():
    stops = tour.stops()
    assert sum(stop.lines for stop in stops) <= tour.LIMIT
    assert len({(stop.path, stop.names) for stop in stops}) == len(stops) > 5
