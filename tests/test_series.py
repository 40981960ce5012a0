"""The series: its lessons run and print what the articles show, and what is claimed can be run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import lessons
import make_site
import pytest
import torch
from embedded import needs_model

ROOT = Path(__file__).parent.parent
SERIES = ROOT / "docs" / "series"
ARTICLES = sorted(SERIES.glob("part*.md"))
PARTS = [path for path in ARTICLES if re.fullmatch(r"part\d+-article\.md", path.name)]
SECTIONS = (
    "The problem",
    "The approach",
    "In ruvon",
    "Measured",
    "Limits",
    "Break it",
    "Takeaways",
)

TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))

FENCE = re.compile(r"^(<!-- .*? -->\n)?```.*?^```$", re.MULTILINE | re.DOTALL)
CLAIM = re.compile(r"\(claims\.md#([\w-]+)\)")
ENTRY = re.compile(r'^\| <a id="([\w-]+)"></a>\S+ \| .+? \| `(.+?)` \| .+ \|$', re.MULTILINE)
SPEED = re.compile(
    r"\d (?:ms|us|s|tok/s|GB/s|tokens (?:a|per) second|times (?:as|faster|slower|sooner|longer))\b"
)


def by_name(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Steps this small lose more by sharing out work than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@needs_model
@pytest.mark.slow
@pytest.mark.parametrize("path", lessons.LESSONS, ids=by_name)
def test_a_lesson_prints_what_its_article_shows(path: Path, one_thread: None):
    texts = [match[3] for match in shown() if match[2] == path.stem]
    assert texts, f"no article shows what {path.name} prints"
    printed = lessons.lasting(lessons.output(path.stem))
    assert {lessons.lasting(text) for text in texts} == {printed}, "run scripts/lessons.py"


def shown() -> list[re.Match[str]]:
    return [match for path in ARTICLES for match in lessons.SHOWN.finditer(path.read_text())]


def test_what_is_shown_is_a_lesson():
    assert {match[2] for match in shown()} <= {path.stem for path in lessons.LESSONS}


@pytest.mark.parametrize("path", lessons.LESSONS, ids=by_name)
def test_a_lesson_is_short_and_says_how_it_is_run(path: Path):
    text = path.read_text()
    assert f"python docs/series/code/{path.name}" in text
    assert 30 <= text.count("\n") <= 140


@pytest.mark.parametrize("path", PARTS, ids=by_name)
def test_every_part_has_the_same_sections(path: Path):
    text = path.read_text()
    found = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert [name for name in found if name in SECTIONS] == list(SECTIONS)
    assert 800 <= len(FENCE.sub("", text).split()) <= 2000


@pytest.mark.parametrize("path", ARTICLES, ids=by_name)
def test_tests_that_catch_somebody_exist(path: Path):
    for name in re.findall(r"`(test_\w+)`", path.read_text()):
        assert f"def {name}(" in TESTS, f"there is no {name}"


@pytest.mark.parametrize("path", ARTICLES, ids=by_name)
def test_who_claims_a_speed_says_where_it_comes_from(path: Path):
    for paragraph in re.split(r"\n\s*\n", FENCE.sub("", path.read_text())):
        if speed := SPEED.search(paragraph):
            assert CLAIM.search(paragraph), f"{speed[0]!r} has no link to claims.md"


def test_every_claim_has_an_entry_and_every_entry_a_claim():
    made = {claim for path in ARTICLES for claim in CLAIM.findall(path.read_text())}
    entries = dict(ENTRY.findall((SERIES / "claims.md").read_text()))
    assert made == entries.keys()


def test_a_claims_command_can_be_run():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for claim, command in ENTRY.findall((SERIES / "claims.md").read_text()):
        program, first, *_ = command.split()
        there = first in targets if program == "make" else (ROOT / first).is_file()
        assert program in ("make", "python"), claim
        assert there, f"{claim}: there is no {first}"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    make_site.stage(folder)
    return folder


def test_pages_of_the_site_lead_somewhere(pages: Path):
    for path in pages.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", FENCE.sub("", path.read_text())):
            if "://" not in target and path.parts[len(pages.parts)] != "source":
                assert (path.parent / target).exists(), f"{path} links to {target}"


def test_the_site_shows_the_way_to_every_document(pages: Path):
    nav = set(re.findall(r'= "([\w/.-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    there = {path.relative_to(pages).as_posix() for path in pages.rglob("*.md")}
    assert nav == {name for name in there if not name.startswith("source/")}, "see zensical.toml"
