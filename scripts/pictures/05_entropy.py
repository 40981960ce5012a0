"""How sure the model is along a text, and what temperature does to it.

python scripts/pictures/05_entropy.py
"""

from __future__ import annotations

from importlib import import_module

import torch
from drawing import BLUE, GREY, ORANGE, llama, save
from matplotlib.figure import Figure

sampling = import_module("05_sampling")
forward_pass = import_module("01_forward_pass")

TEXT = "The capital of France is Paris. The capital of Italy is Rome. My favourite animal is the"


def main() -> None:
    model = llama.load()
    ids = model.encode(TEXT)
    logits_TV = model.forward(ids, list(range(len(ids))), forward_pass.attend)
    along(model, ids, logits_TV)
    temperature(logits_TV)


def along(model: llama.Llama, ids: list[int], logits_TV: torch.Tensor) -> None:
    """Entropy before each token, and the surprise at the one that came, both in bits."""
    p_TV = logits_TV.softmax(-1)
    entropies = [sampling.entropy(p) for p in p_TV[:-1]]
    surprises = [-float(p_TV[t, ids[t + 1]].log2()) for t in range(len(ids) - 1)]
    figure = Figure(figsize=(9, 2.6))
    axes = figure.add_subplot()
    at = range(len(entropies))
    axes.bar(at, entropies, color=GREY, label="entropy: how open it was")
    axes.plot(at, surprises, "o", color=ORANGE, label="surprise: what came")
    axes.set_xticks(at, [model.decode([id]) for id in ids[1:]], rotation=60, ha="right")
    axes.set_ylabel("bits")
    axes.legend(frameon=False)
    save(figure, "05-entropy")
    mean = sum(surprises) / len(surprises)
    print(f"mean surprise {mean:.2f} bits, perplexity {2**mean:.1f};", end=" ")
    print(f"mean entropy {sum(entropies) / len(entropies):.2f} bits")
    for t, (entropy, surprise) in enumerate(zip(entropies, surprises, strict=True)):
        print(f"  {model.decode([ids[t + 1]])!r}: {entropy:.2f}, {surprise:.2f}")


def temperature(logits_TV: torch.Tensor) -> None:
    """Entropy at temperatures from 0.1 to 2, where the model is sure and where it is not."""
    figure = Figure(figsize=(6, 2.6))
    axes = figure.add_subplot()
    temperatures = [t / 20 for t in range(2, 41)]
    for row, colour, label in ((4, BLUE, "The capital of France is ..."),
                               (-1, ORANGE, "... My favourite animal is the ...")):  # fmt: skip
        bits = [
            sampling.entropy(sampling.distribution(logits_TV[row], sampling.Sampling(t)))
            for t in temperatures
        ]
        axes.plot(temperatures, bits, color=colour, label=label)
    axes.set_xlabel("temperature")
    axes.set_ylabel("entropy, bits")
    axes.legend(frameon=False)
    save(figure, "05-temperature")


if __name__ == "__main__":
    main()
