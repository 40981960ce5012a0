"""The tables of bench/peers.py. By itself it prints what earlier runs wrote, one machine beside the
next, in the form of the README:

    python bench/peer_tables.py bench/results/peers-DATE.json [ANOTHER.json ...]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# name → (label, unit, whether more is better)
ROWS = {
    "itl_ms": ("time between tokens, one stream", "ms", False),
    "decode_tok_s": ("decode, one stream", "tok/s", True),
    "ttft_512_ms": ("first token, 512-token prompt", "ms", False),
    "output_tok_s_4": ("output, concurrency 4", "tok/s", True),
    "output_tok_s_16": ("output, concurrency 16", "tok/s", True),
    "output_tok_s_32": ("output, concurrency 32", "tok/s", True),
    "ttft_ms_32": ("first token, concurrency 32", "ms", False),
    "mixed_itl_p99_ms": ("between tokens, mixed load, p99", "ms", False),
    "ready_s": ("ready", "s", False),
    "ready_memory_mb": ("memory when ready", "MB", False),
    "peak_memory_mb": ("peak memory", "MB", False),
    "others_pct": ("of the machine used by others", "%", False),
}


@dataclass(slots=True)
class Column:
    """What became of one peer with one format: a value per round for each row, or why not."""

    peer: str
    format: str
    note: str = ""
    values: dict[str, list[float]] = field(default_factory=dict)
    instructions: str = ""
    trouble: str = ""

    @property
    def name(self) -> str:
        return f"{self.peer} {self.format}"

    def record(self, numbers: Mapping[str, float]) -> None:
        for row, value in numbers.items():
            self.values.setdefault(row, []).append(value)

    def median(self, row: str) -> float | None:
        return statistics.median(self.values[row]) if row in self.values else None


def render(where: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """The values with their spread, ruvon's factors, the same for a document, and notes."""
    measured = [column for column in columns if column.values]
    cells = [[label(row), *(cell(column, row) for column in measured)] for row in rows_of(measured)]
    lines = [f"{where['model']} on {describe(where)}; median (least to most) of the rounds", ""]
    lines += table(["", *(column.name for column in measured)], cells)
    lines += factors("each with the same format, ruvon is better by", same_format(measured))
    if first := first_of_ruvon(measured):
        pairs = [(first, column) for column in measured if column.peer != "ruvon"]
        lines += factors(f"{first.name} is better by", pairs)
    lines += ["", *document([(where, columns)])]
    notes = [f"{column.name}: {note(column)}." for column in measured]
    missing = [f"{column.name}: left out, {column.trouble}" for column in columns if column.trouble]
    return "\n".join([*lines, "", *notes, *missing])


def describe(where: Mapping[str, Any]) -> str:
    return f"{where['cpu']}, {where['cores']} cores, which read {where['read_gb_s']} GB/s"


def note(column: Column) -> str:
    return "; ".join(filter(None, (column.note, column.instructions)))


def rows_of(columns: Sequence[Column]) -> list[str]:
    return [row for row in ROWS if any(row in column.values for column in columns)]


def first_of_ruvon(columns: Sequence[Column]) -> Column | None:
    return next((column for column in columns if column.peer == "ruvon"), None)


def same_format(columns: Sequence[Column]) -> list[tuple[Column, Column]]:
    ours = {column.format: column for column in columns if column.peer == "ruvon"}
    others = (column for column in columns if column.peer != "ruvon")
    return [(ours[column.format], column) for column in others if column.format in ours]


def factors(title: str, pairs: Sequence[tuple[Column, Column]]) -> list[str]:
    """A table of ruvon's factor to each peer, after its title; nothing if there is no pair."""
    if not pairs:
        return []
    rows = [
        [label(row), *(factor(mine, other, row, ".2f") for mine, other in pairs)]
        for row in rows_of([column for pair in pairs for column in pair])
        if row != "others_pct"
    ]
    return ["", f"{title}:", "", *table(["", *(other.name for _, other in pairs)], rows)]


def document(results: Sequence[tuple[Mapping[str, Any], Sequence[Column]]]) -> list[str]:
    """Markdown to paste: medians of ruvon's first column and of its peers, with its factors to
    them in brackets. Several machines stand side by side."""
    head, columns = ["measured"], []
    for where, measured in results:
        first = first_of_ruvon(measured)
        shown = [column for column in measured if column is first or column.peer != "ruvon"]
        columns += [(first, column) for column in shown if column.values]
        head += [f"{c.name}, {where['cpu']}" if results[1:] else c.name for c in shown if c.values]
    rows = [
        [label(row), *(short(first, column, row) for first, column in columns)]
        for row in rows_of([column for _, column in columns])
    ]
    dashes = ["---", *["---:"] * len(columns)]
    return [f"| {' | '.join(cells)} |" for cells in (head, dashes, *rows)]


def label(row: str) -> str:
    return f"{ROWS[row][0]} ({ROWS[row][1]})"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def cell(column: Column, row: str) -> str:
    values = column.values.get(row)
    if not values:
        return "-"
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"


def short(first: Column | None, column: Column, row: str) -> str:
    value = column.median(row)
    if value is None or first is None or first is column or row == "others_pct":
        return "-" if value is None else number(value)
    return f"{number(value)} ({factor(first, column, row, '.1f')})"


def factor(ours: Column, theirs: Column, row: str, form: str) -> str:
    """How many times better ours is."""
    mine, other = ours.median(row), theirs.median(row)
    if not mine or not other:
        return "-"
    return format(mine / other if ROWS[row][2] else other / mine, form)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    dashes = ["-" * width for width in widths]
    return [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in (head, dashes, *rows)
    ]


def main() -> None:
    results = []
    for path in sys.argv[1:]:
        content = json.loads(Path(path).read_text())
        results.append((content["machine"], [Column(**one) for one in content["columns"]]))
    print("\n".join(document(results)))


if __name__ == "__main__":
    main()
