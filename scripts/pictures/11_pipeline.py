"""When each of lesson 11's two stages computes, with one batch under way and with two.

Bars are processor time, so that a busy machine draws the same picture; a tick is as long as its
longest bar.

python scripts/pictures/11_pipeline.py
"""

from __future__ import annotations

from importlib import import_module
from time import thread_time
from typing import Any, NamedTuple

import torch
from drawing import BLUE, ORANGE, llama, save
from matplotlib.figure import Figure

lesson: Any = import_module("11_pipeline")
compute = lesson.compute


class Bar(NamedTuple):
    stage: int
    batch: str
    start: float
    took: float


def main() -> None:
    torch.set_num_threads(1)
    model = llama.load()
    watch(model, 1)  # what is called first takes longer
    runs = [watch(model, count) for count in (1, 2)]
    longest = max(bar.start + bar.took for bars in runs for bar in bars)
    figure = Figure(figsize=(8, 3))
    for place, bars in enumerate(runs, 1):
        axes = figure.add_subplot(2, 1, place)
        for bar in bars:
            color = BLUE if bar.batch == "A" else ORANGE
            axes.barh(1 - bar.stage, bar.took, left=bar.start, color=color, edgecolor="white")
        busy = sum(bar.took for bar in bars) / 2 / max(bar.start + bar.took for bar in bars)
        axes.set_yticks([1, 0], ["layers 0 to 14", "layers 15 to 29"])
        axes.set_xlim(0, longest)
        axes.set_title(
            f"{place} batch{'es' * (place > 1)}: busy {busy:.0%} of the time", loc="left"
        )
    axes.set_xlabel("seconds of a processor")
    figure.tight_layout()
    save(figure, "11-pipeline")


def watch(model: Any, count: int) -> list[Bar]:
    """All that was computed, tick by tick."""
    took: dict[int, list[tuple[str, float]]] = {stage: [] for stage in range(len(lesson.STAGES))}

    def timed(model: Any, stage: int, batch: Any) -> None:
        start = thread_time()
        compute(model, stage, batch)
        took[stage].append((batch.name if batch else "", thread_time() - start))

    lesson.compute = timed
    lesson.run(model, lesson.make_batches(model, count))
    lesson.compute = compute
    bars, now = [], 0.0
    for tick in zip(*took.values(), strict=True):
        bars += [
            Bar(stage, name, now, seconds) for stage, (name, seconds) in enumerate(tick) if name
        ]
        now += max(seconds for _, seconds in tick)
    return bars


if __name__ == "__main__":
    main()
