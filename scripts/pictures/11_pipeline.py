"""When each of lesson 11's two stages computes, with one batch under way and with two.

python scripts/pictures/11_pipeline.py
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from time import perf_counter
from typing import Any

import torch
from drawing import BLUE, ORANGE, llama, save
from matplotlib.figure import Figure

lesson: Any = import_module("11_pipeline")
compute = lesson.compute


def main() -> None:
    torch.set_num_threads(1)
    model = llama.load()
    lesson.run(model, lesson.make_batches(model, 1))  # what is called first takes longer
    runs = [watch(model, count) for count in (1, 2)]
    figure = Figure(figsize=(8, 3))
    for place, bars in enumerate(runs, 1):
        axes = figure.add_subplot(2, 1, place)
        for stage, name, start, took in bars:
            color = BLUE if name == "A" else ORANGE
            axes.barh(1 - stage, took, left=start, color=color, edgecolor="white", height=0.8)
        busy = sum(took for _, _, _, took in bars) / 2 / max(s + took for _, _, s, took in bars)
        axes.set_yticks([1, 0], ["layers 0 to 14", "layers 15 to 29"])
        axes.set_xlim(0, max(s + took for run in runs for _, _, s, took in run))
        axes.set_title(f"{place} batch(es): busy {busy:.0%} of the time", loc="left")
    axes.set_xlabel("seconds")
    figure.tight_layout()
    save(figure, "11-pipeline")


def watch(model: Any, count: int) -> list[tuple[int, str, float, float]]:
    """→ (stage, batch, start, seconds) of all that was computed."""
    bars: list[tuple[int, str, float, float]] = []
    begin = perf_counter()

    def timed(model: Any, stage: int, batch: Any) -> None:
        start = perf_counter()
        compute(model, stage, batch)
        if batch is not None:
            bars.append((stage, batch.name, start - begin, perf_counter() - start))

    lesson.compute = partial(timed)
    lesson.run(model, lesson.make_batches(model, count))
    lesson.compute = compute
    return bars


if __name__ == "__main__":
    main()
