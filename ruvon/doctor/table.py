"""`ruvon doctor`: run, print a table, write a report."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ruvon import __version__
from ruvon.doctor.check import Check, Result
from ruvon.doctor.run import choose, examine
from ruvon.errors import ConfigError, RuvonError


def print_examination(
    url: str,
    globs: Sequence[str],
    report: Path | None,
    console: Console,
    **options: Any,
) -> None:
    """Run the checks that ``globs`` name and print what came of them; ``options`` are those of
    `examine`. Raises RuvonError where a check failed that is not optional."""
    checks = choose(globs)
    if not checks:
        raise ConfigError(f"--only: no check is called {' or '.join(globs)}")
    begun = time.monotonic()
    with Console(stderr=True).status("starting") as status:

        def tell(result: Result) -> None:
            status.update(escape(result.check.id))

        model, results = asyncio.run(examine(url, checks, progress=tell, **options))
    seconds = time.monotonic() - begun
    if report is not None:
        report.write_bytes(orjson.dumps(as_json(url, model, seconds, results), option=2))
    print_results(model, url, seconds, results, console)
    if failures := [r for r in results if r.outcome == "fail" and not r.check.optional]:
        raise RuvonError(f"{len(failures)} of {len(results)} checks failed")


def print_results(
    model: str, url: str, seconds: float, results: Sequence[Result], console: Console
) -> None:
    """Counts for each group, then each check that did not pass."""
    console.print(make_table(f"{model} at {url}", results))
    skipped = Counter(result.detail for result in results if result.outcome == "skip")
    for reason, number in skipped.most_common():
        console.print(f"skipped {number}: {reason}", markup=False, highlight=False)
    for result in results:
        if result.outcome == "fail":
            mark = "[yellow]fail (optional)[/]" if result.check.optional else "[red]FAIL[/]"
            said = escape(f"{result.check.id}: {result.check.title} {result.detail}")
            console.print(f"{mark} {said}", highlight=False)
    console.print(f"{len(results)} checks in {seconds:.1f} s", highlight=False)


def make_table(title: str, results: Sequence[Result]) -> Table:
    """A line for each group, and one for all."""
    table = Table("group", title=escape(title))
    for name in ("passed", "failed", "optional failed", "skipped"):
        table.add_column(name, justify="right")
    for group in dict.fromkeys(result.check.group for result in results):
        table.add_row(group, *cells([r for r in results if r.check.group == group]))
    table.add_section()
    table.add_row("all", *cells(results))
    return table


def cells(results: Sequence[Result]) -> list[str]:
    counts = count(results)
    colours = {"failed": "red", "optional_failed": "yellow"}
    return [
        f"[{colours[name]}]{number}[/]" if number and name in colours else str(number or "")
        for name, number in counts.items()
    ]


def count(results: Sequence[Result]) -> dict[str, int]:
    """How many of each outcome."""
    failed = [result.check.optional for result in results if result.outcome == "fail"]
    return {
        "passed": sum(result.outcome == "pass" for result in results),
        "failed": failed.count(False),
        "optional_failed": failed.count(True),
        "skipped": sum(result.outcome == "skip" for result in results),
    }


def as_json(url: str, model: str, seconds: float, results: Sequence[Result]) -> dict[str, Any]:
    """The report for machines."""
    return {
        "ruvon": __version__,
        "url": url,
        "model": model,
        "seconds": round(seconds, 3),
        "counts": count(results),
        "checks": [
            {
                "id": result.check.id,
                "title": result.check.title,
                "optional": result.check.optional,
                "outcome": result.outcome,
                "detail": result.detail,
                "seconds": round(result.seconds, 3),
            }
            for result in results
        ],
    }


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """What would be asked."""
    for check in checks:
        mark = " (optional)" if check.optional else ""
        console.print(f"{check.id}: {check.title}{mark}", markup=False, highlight=False)
