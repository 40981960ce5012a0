"""A server under a load that rises, in the numbers that /metrics has.

python scripts/pictures/17_metrics.py
"""

from __future__ import annotations

from clock import Run, rising
from drawing import BLUE, GREY, ORANGE, save
from matplotlib.figure import Figure

SECONDS, PLACES = 120.0, 16
FASTEST = 8.0  # requests a second at the end
WINDOW = 5.0  # seconds over which a rate or a mean is taken
MOST_POINTS = 400  # of a line: nobody sees more of them


def main() -> None:
    run = Run(PLACES)
    at, running, waiting = [], [], []
    for _ in run.open(rising(0.2, FASTEST, SECONDS), SECONDS):
        stats = run.engine.stats
        at.append(run.now)
        running.append(stats.num_running)
        waiting.append(stats.num_waiting)
    figure = Figure(figsize=(8, 5))
    load, rate, wait = (figure.add_subplot(3, 1, place) for place in (1, 2, 3))
    drawn = slice(None, None, len(at) // MOST_POINTS + 1)
    load.stackplot(
        at[drawn], running[drawn], waiting[drawn],
        colors=(BLUE, ORANGE), labels=("running", "waiting"),
    )  # fmt: skip
    moments = sorted(moment for asked in run.asked.values() for moment in asked.tokens)
    ends = list(range(2, int(SECONDS), 2))
    rate.plot(ends, [len(within(moments, end)) / WINDOW for end in ends], color=BLUE,
              label="output tokens a second")  # fmt: skip
    firsts = {a.first: a.first - a.at for a in run.asked.values() if a.first}
    gaps = {b: b - a for asked in run.asked.values()
            for a, b in zip(asked.tokens, asked.tokens[1:], strict=False)}  # fmt: skip
    for values, color, label in (
        (firsts, ORANGE, "time to first token"), (gaps, GREY, "inter-token latency"),
    ):  # fmt: skip
        means = [mean([values[m] for m in within(sorted(values), end)]) for end in ends]
        wait.plot(ends, means, color=color, label=f"{label}, mean seconds")
    wait.set_yscale("log")
    wait.set_xlabel(f"seconds; requests come faster and faster, up to {FASTEST:g} a second")
    for panel in (load, rate, wait):
        panel.legend(frameon=False, loc="upper left")
        panel.set_xlim(0, SECONDS)
    figure.tight_layout()
    save(figure, "17-metrics")


def within(moments: list[float], end: float) -> list[float]:
    return [moment for moment in moments if end - WINDOW < moment <= end]


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


if __name__ == "__main__":
    main()
