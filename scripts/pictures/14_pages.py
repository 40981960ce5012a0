"""Who holds which page in lesson 14, step by step: reserved beforehand, and as it is needed.

python scripts/pictures/14_pages.py
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from drawing import llama, save
from matplotlib import colormaps
from matplotlib.figure import Figure

lesson: Any = import_module("14_pages")


def main() -> None:
    torch.set_num_threads(1)
    model = llama.load()
    runs = [watch(model, reserve=reserve) for reserve in (True, False)]
    figure = Figure(figsize=(8, 4.4))
    most = max(image.shape[1] for image in runs)
    for place, (image, title) in enumerate(
        zip(runs, ("room for 48 tokens reserved", "pages as they are needed"), strict=True), 1
    ):
        axes = figure.add_subplot(2, 1, place)
        axes.imshow(image, aspect="auto", interpolation="nearest", origin="lower")
        axes.set_xlim(-0.5, most - 0.5)
        axes.set_xticks(range(0, most, 4))
        axes.set_ylabel("page")
        axes.set_title(f"{title}: {image.shape[1]} steps", loc="left")
    axes.set_xlabel("step; a colour for each sequence, pale where nothing was written yet")
    figure.tight_layout()
    save(figure, "14-pages")


def watch(model: Any, *, reserve: bool) -> np.ndarray:
    """→ colours [pages, steps, 3]."""
    engine, sequences = lesson.start(model, reserve=reserve)
    colors = colormaps["tab10"](np.arange(len(sequences)))[:, :3]
    columns = []
    while engine.waiting or engine.running:
        engine.schedule()
        column = np.ones((lesson.PAGES, 3))
        for seq in engine.running:
            color = colors[[id(each) for each in sequences].index(id(seq))]
            written = seq.cache.length + len(seq.pending())
            for i, page in enumerate(seq.cache.table):
                pale = i * lesson.PAGE >= written
                column[page] = 0.75 + 0.25 * color if pale else color
        columns.append(column)
        engine.step()
    return np.stack(columns, axis=1)


if __name__ == "__main__":
    main()
