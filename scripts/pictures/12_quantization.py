"""How far lesson 12's model is from the original, by bits a weight and by the size of groups.

python scripts/pictures/12_quantization.py
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from drawing import BLUE, GREY, ORANGE, llama, save
from matplotlib.figure import Figure
from torch import Tensor

lesson: Any = import_module("12_quantization")

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = {32: BLUE, 64: ORANGE, 192: GREY}


def main() -> None:
    torch.set_num_threads(1)
    model = lesson.off_the_grid(llama.load())
    ids = model.encode(lesson.TEXT)
    exact = lesson.log_probabilities(model, ids)
    axes = (figure := Figure(figsize=(6, 3.4))).add_subplot()
    for group, color in GROUPS.items():
        points = [(bits + 32 / group, distance(model, ids, exact, bits, group)) for bits in BITS]
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=f"groups of {group}")
        print(group, [(round(at, 2), round(kl, 4)) for at, kl in points])
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight, scales and offsets included")
    axes.set_ylabel("KL divergence, nats")
    axes.legend(frameon=False)
    save(figure, "12-quantization")


def distance(model: Any, ids: list[int], exact: Tensor, bits: int, group: int) -> float:
    """The mean divergence with the matrices of all layers on such grids."""

    def change(weight: Tensor) -> Tensor:
        values = weight.view(-1, group)
        least, greatest = values.aminmax(dim=1, keepdim=True)
        scale, least = lesson.half((greatest - least) / (2**bits - 1)), lesson.half(least)
        codes = ((values - least) / scale).round().clamp(0, 2**bits - 1)
        return (codes * scale + least).view_as(weight)

    form = lesson.Format(change, bits, lesson.int8, 8.5)
    other = lesson.log_probabilities(lesson.rounded(model, form), ids)
    return float((exact.exp() * (exact - other)).sum(-1).mean())


if __name__ == "__main__":
    main()
