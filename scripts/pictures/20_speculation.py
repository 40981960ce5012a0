"""How many tokens each step of lesson 20 gives, where a text repeats itself and where it does not.

python scripts/pictures/20_speculation.py
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from drawing import BLUE, ORANGE, llama, save
from matplotlib.figure import Figure

lesson: Any = import_module("20_speculation")


def main() -> None:
    torch.set_num_threads(1)
    model = llama.load()
    axes = (figure := Figure(figsize=(7, 2.6))).add_subplot()
    for (name, prompt), color in zip(lesson.PROMPTS.items(), (BLUE, ORANGE), strict=True):
        _, steps, guessed = lesson.generate(model, prompt, guess=True)
        total = [sum(steps[:i]) for i in range(len(steps) + 1)]
        label = f"{name}: {guessed} guesses in {len(steps)} steps"
        axes.plot(range(len(total)), total, "o-", color=color, markersize=3, label=label)
    axes.plot([0, lesson.NEW], [0, lesson.NEW], ":", color="black", label="one token a step")
    axes.set_xlabel("step")
    axes.set_ylabel("tokens so far")
    axes.legend(frameon=False)
    save(figure, "20-speculation")


if __name__ == "__main__":
    main()
