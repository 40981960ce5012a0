"""`ruvon verify`: show that the same request gives the same bytes, and what the kernels cost."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ruvon.config import EngineConfig
from ruvon.errors import RuvonError
from ruvon.models.tokenizer import Tokenizer
from ruvon.verify.cases import Row
from ruvon.verify.quality import Comparison
from ruvon.verify.report import Report, verify


def print_verification(
    config: EngineConfig, requests: int, tokens: int, reference: bool, console: Console
) -> None:
    """Run it, with the case at hand on stderr, and print what was found. Raises RuvonError if a
    promise was broken."""
    with Console(stderr=True).status("starting") as status:
        report = verify(
            config,
            requests,
            tokens,
            reference=reference,
            progress=lambda phase, share: status.update(escape(phase)),
        )
    console.print(make_table(report))
    for line in remarks(report):
        console.print(line, markup=False, highlight=False)
    unequal = next((row for row in report.rows if not row.equal), None)
    if unequal is None:
        return
    first = f"{unequal.name}: {explain(unequal, report.tokenizer)}"
    if not report.holds:
        raise RuvonError(first)
    console.print(f"The first difference: {first}", markup=False, highlight=False)


def make_table(report: Report) -> Table:
    """A line for each case."""
    where = f"{report.threads} threads, " if report.device == "cpu" else f"{report.device}, "
    table = Table(
        "setting", title=f"{report.model}, kernels {report.kernels}, {where}{report.dtype}"
    )
    for name in ("requests", "tokens", "preempted", "cached"):
        table.add_column(name, justify="right")
    table.add_column("identical?")
    for row in report.rows:
        numbers = (len(row.outcome.answers), row.outcome.num_tokens)
        rare = (row.outcome.preempted, row.outcome.cached)
        cells = [*(f"{n:,}" for n in numbers), *(f"{n:,}" if n else "" for n in rare)]
        table.add_row(escape(row.name), *cells, verdict(row, report.promised))
    return table


def verdict(row: Row, promised: bool) -> str:
    if row.missing:
        return "[red]not shown[/]"
    if row.difference is None:
        return "[green]yes[/]"
    return "[red]NO[/]" if promised else "[yellow]no[/]"


def remarks(report: Report) -> list[str]:
    """What the table cannot say."""
    alone = report.rows[0].outcome.fingerprint
    lines = [f"Every token and log-probability alone, as one number: {alone}"]
    if not report.promised:
        lines.append(
            f"Kernels {report.kernels!r} promise nothing here: results may depend on what else "
            "is in a step. Identical rows are so this time."
        )
    if report.comparison:
        lines.append(describe(report.comparison))
    return lines


def explain(row: Row, tokenizer: Tokenizer) -> str:
    if row.difference is not None:
        return row.difference.describe(tokenizer)
    return row.missing or "identical"


def describe(comparison: Comparison) -> str:
    return (
        f"Against plain torch in float32, on a text of {len(comparison.divergence_N)} tokens: KL "
        f"divergence {comparison.mean_divergence:.2g} nats on average and "
        f"{comparison.most_divergence:.2g} at most, the same likeliest token in "
        f"{comparison.agreement:.1%}."
    )
