"""Prints the way through the code that docs/tour.md goes, with the lines there are to read.

python scripts/tour.py
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fragments import span

TOUR = Path(__file__).parent.parent / "docs" / "tour.md"
LIMIT = 2500
"""Lines that can be read in an evening."""

STOP = re.compile(r"^\d+\. \[`([^`]+)`\]\(([^)]+)\)((?:,?\s+(?:and )?`[\w.]+`)*):", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Stop:
    """A file, or what is named of it."""

    path: str
    names: tuple[str, ...]
    lines: int


def main() -> None:
    for number, stop in enumerate(stops(), 1):
        print(f"{number:>2}. {stop.lines:>4}  {stop.path}", *stop.names)
    print(f"   {sum(stop.lines for stop in stops()):>5}  lines, of at most {LIMIT:,}")


def stops() -> list[Stop]:
    """In reading order. Raises LookupError and OSError for what is not there."""
    return [make_stop(*match) for match in STOP.findall(TOUR.read_text())]


def make_stop(path: str, link: str, rest: str) -> Stop:
    source = (TOUR.parent / link).read_text()
    names = tuple(re.findall(r"`([\w.]+)`", rest))
    spans = [span(source, name) for name in names]
    lines = sum(end - start + 1 for start, end in spans) if names else source.count("\n")
    return Stop(path, names, lines)


if __name__ == "__main__":
    main()
