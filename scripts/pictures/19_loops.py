"""The same server asked in a closed and in an open loop.

python scripts/pictures/19_loops.py
"""

from __future__ import annotations

from collections.abc import Sequence

from clock import Run, rising
from drawing import BLUE, GREY, ORANGE, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SECONDS, PLACES = 150.0, 16
CLIENTS = (1, 2, 4, 8, 12, 16, 24, 32)
RATES = (1, 2, 3, 4, 5, 6, 6.5, 7, 7.5, 8)


def main() -> None:
    closed, opened = [], []
    for clients in CLIENTS:
        run = Run(PLACES)
        run.closed(clients, SECONDS)
        closed.append(summary(run))
    for rate in RATES:
        run = Run(PLACES)
        for _ in run.open(rising(rate, rate, SECONDS), SECONDS):
            pass
        opened.append(summary(run))
    figure = Figure(figsize=(8, 4.6))
    draw(figure, 1, CLIENTS, closed, "requests at once (closed)")
    draw(figure, 2, RATES, opened, "requests a second (open)")
    figure.tight_layout()
    save(figure, "19-loops")


def summary(run: Run) -> tuple[float, float, float]:
    """→ (output tokens a second, seconds to the first token, p50 and p99). Who waits still has
    waited as long by now."""
    tokens = sum(len(asked.tokens) for asked in run.asked.values())
    waits = sorted((asked.first or run.now) - asked.at for asked in run.asked.values())
    p50, p99 = (waits[min(int(share * len(waits)), len(waits) - 1)] for share in (0.5, 0.99))
    print(f"{len(waits)} requests: {tokens / run.now:.0f} tok/s, {p50:.3f} s, {p99:.3f} s")
    return tokens / run.now, p50, p99


def draw(
    figure: Figure, column: int, at: Sequence[float], runs: list[tuple[float, float, float]], x: str
) -> None:
    top: Axes = figure.add_subplot(2, 2, column)
    bottom: Axes = figure.add_subplot(2, 2, column + 2)
    rates, p50, p99 = zip(*runs, strict=True)
    top.plot(at, rates, "o-", color=BLUE)
    top.set_ylim(0, 500)
    top.set_ylabel("output tokens/s")
    bottom.plot(at, p99, "o-", color=ORANGE, label="p99")
    bottom.plot(at, p50, "o-", color=BLUE, label="p50")
    bottom.axhline(1, color=GREY, linestyle=":")
    bottom.set_ylim(0.03, 30)
    bottom.set_yscale("log")
    bottom.set_ylabel("first token, seconds")
    bottom.set_xlabel(x)
    bottom.legend(frameon=False)


if __name__ == "__main__":
    main()
