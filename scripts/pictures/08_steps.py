"""Who computes in which step, in a static batch and in continuous batching.

python scripts/pictures/08_steps.py
"""

from __future__ import annotations

from importlib import import_module

from drawing import BLUE, GREY, ORANGE, llama, save
from matplotlib.figure import Figure
from matplotlib.patches import Patch

batching = import_module("08_continuous_batch")


def main() -> None:
    model = llama.load()
    figure = Figure(figsize=(9, 2.4))
    for place, (name, continuous) in enumerate((("static", False), ("continuous", True)), 1):
        axes = figure.add_subplot(1, 2, place)
        done, steps, _ = batching.run(model, continuous, places=3)
        for row, seq in enumerate(done):
            begun = seq.first - 1  # the step that computed the prompt gave the first token
            axes.barh(row, begun - seq.arrived, left=seq.arrived, color=GREY)
            axes.barh(row, 1, left=begun, color=ORANGE, edgecolor="white")
            for i in range(1, len(seq.tokens)):
                axes.barh(row, 1, left=begun + i, color=BLUE, edgecolor="white")
        axes.invert_yaxis()
        axes.set_xlim(0, 15)
        axes.set_title(f"{name}: {steps} steps")
        axes.set_xlabel("step")
        axes.set_yticks(range(len(done)), [f"request {i}" for i in range(len(done))])
    names = ((GREY, "waits"), (ORANGE, "its prompt"), (BLUE, "one token"))
    figure.legend(
        handles=[Patch(color=colour, label=label) for colour, label in names],
        loc="lower center", ncols=3, frameon=False, bbox_to_anchor=(0.5, -0.2),
    )  # fmt: skip
    figure.subplots_adjust(wspace=0.35)
    save(figure, "08-steps")


if __name__ == "__main__":
    main()
