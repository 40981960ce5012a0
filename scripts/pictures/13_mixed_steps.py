"""What lesson 13's steps compute and when its running answers get their tokens, by the budget. In
processor time, so that a busy machine draws the same picture.

python scripts/pictures/13_mixed_steps.py
"""

from __future__ import annotations

from importlib import import_module
from time import process_time
from typing import Any

import torch
from drawing import BLUE, ORANGE, llama, save
from matplotlib.figure import Figure

lesson: Any = import_module("13_mixed_steps")


def main() -> None:
    torch.set_num_threads(1)
    model = llama.load()
    watch(model, 512)  # what is called first takes longer
    runs = {budget: watch(model, budget) for budget in (512, 48)}
    longest = max(end for steps, _ in runs.values() for _, end, _ in steps)
    figure = Figure(figsize=(8, 3.6))
    for place, (budget, (steps, moments)) in enumerate(runs.items(), 1):
        axes = figure.add_subplot(2, 1, place)
        for start, end, size in steps:
            axes.bar(start, size, end - start, align="edge", color=BLUE, edgecolor="white")
        axes.plot(moments, [1.3] * len(moments), "|", color=ORANGE, markersize=12, mew=2)
        axes.set_yscale("log", base=4)
        axes.set_yticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
        axes.set_ylim(0.8, 600)
        axes.set_xlim(0, longest)
        axes.set_ylabel("tokens")
        axes.set_title(f"at most {budget} tokens a step", loc="left")
    axes.set_xlabel("seconds of a processor; orange: a token of an answer that was running before")
    figure.tight_layout()
    save(figure, "13-mixed-steps")


def watch(model: Any, budget: int) -> tuple[list[tuple[float, float, int]], list[float]]:
    """→ (start, end and size of each step, when the first answer got its tokens)."""
    engine = lesson.Engine(model, budget)
    first, _ = [engine.add(question) for question in lesson.QUESTIONS[:2]]
    steps: list[tuple[float, float, int]] = []
    moments: list[float] = []
    begin = process_time()
    while engine.running:
        if len(steps) == 2:
            engine.add(lesson.TEACHER + lesson.QUESTIONS[2])
        start = process_time()
        engine.step()
        steps.append((start - begin, process_time() - begin, engine.sizes[-1]))
        if len(first.tokens) > len(moments):
            moments.append(steps[-1][1])
    return steps, moments


if __name__ == "__main__":
    main()
