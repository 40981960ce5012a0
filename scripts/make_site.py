"""Stages what the site is built of: the documents, and a page for each source file they link to.

    python scripts/make_site.py && zensical build --clean --strict

In the repository a document links to files beside it. On the site there are only pages: a link to
a source file leads to a page that shows it, one to a folder to a page that lists it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "build" / "pages"
DOCS = Path("docs")
PROJECT = {Path(name) for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}

FENCE = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)#\s]+)([^)\s]*\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".json": "json"}


def main() -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    stage(PAGES)


def stage(folder: Path) -> None:
    """Write all pages and pictures into a folder."""
    documents = [path.relative_to(ROOT) for path in (ROOT / DOCS).rglob("*.md")]
    shown: set[Path] = set()
    for path in sorted([*documents, *PROJECT]):
        write(folder / page(path), linked(path, (ROOT / path).read_text(), shown))
    for path in sorted(shown):
        write(folder / page(path), source(path, shown))
    for picture in [*(ROOT / DOCS).rglob("*.svg"), *(ROOT / DOCS).rglob("*.png")]:
        target = folder / page(picture.relative_to(ROOT))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)


def page(path: Path) -> Path:
    """Where a file's page is, from the site's root."""
    if path in PROJECT:
        return Path("project", path)
    if path == DOCS / "README.md":
        return Path("index.md")
    if path.parts[0] == "docs" and path.suffix in (".md", ".svg", ".png"):
        return path.relative_to(DOCS)
    return Path("source", f"{path}.md")


def linked(path: Path, text: str, shown: set[Path]) -> str:
    """A document whose links lead to pages; the source files among these are added to ``shown``."""

    def link(match: re.Match[str]) -> str:
        if "://" in match[2] or match[2].startswith("mailto:"):
            return match[0]
        target = Path(os.path.normpath(path.parent / match[2]))
        there = page(target)
        if there.parts[0] == "source":
            shown.add(target)
        return f"{match[1]}{os.path.relpath(there, page(path).parent)}{match[3]}"

    parts, end = [], 0
    for fence in FENCE.finditer(text):
        shape = fence[0].replace("```mermaid", "```text", 1)  # a drawing would be fetched code's
        parts += [LINK.sub(link, text[end : fence.start()]), shape]
        end = fence.end()
    return "".join([*parts, LINK.sub(link, text[end:])])


def source(path: Path, shown: set[Path]) -> str:
    """The page of a file, or of a folder."""
    if not (ROOT / path).is_dir():
        language = LANGUAGES.get(path.suffix, "text")
        return f"# {path}\n\n~~~~{language}\n{(ROOT / path).read_text()}~~~~\n"
    names = sorted(
        each.relative_to(ROOT) for each in (ROOT / path).iterdir() if each.name[0] not in "._"
    )
    lines = [
        f"- [{name.name}]({os.path.relpath(page(name), page(path).parent)})"
        if name in shown
        else f"- {name.name}"
        for name in names
    ]
    return "\n".join([f"# {path}", "", *lines, ""])


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    main()
