"""Where three heads look, how much goes to the first token, and what each layer would say.

python scripts/pictures/03_attention.py
"""

from __future__ import annotations

import torch
from drawing import BLUE, GREY, ORANGE, llama, save
from matplotlib.figure import Figure
from torch import Tensor

TEXT = "The capital of France is Paris. The capital of Italy is"
HEADS = ((16, 0, "the token before"), (17, 5, "what came after it last time"), (24, 0, "nowhere"))


def main() -> None:
    model = llama.load()
    ids = model.encode(TEXT)
    words = [model.decode([id]) for id in ids]
    weights, stream = look(model, ids)
    heat(weights, words)
    first(weights)
    lens(model, stream)
    print(f"positions from 1,000 on change logits by {shifted(model, ids):.0e} at most")


def look(model: llama.Llama, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    """→ (weights of every layer and head [L, H, T, T], the stream [T, C] behind each layer)."""
    weights: list[Tensor] = []

    def attend(layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        share = q_THD.shape[1] // k_TGD.shape[1]
        k, v = k_TGD.repeat_interleave(share, dim=1), v_TGD.repeat_interleave(share, dim=1)
        scores = torch.einsum("thd,shd->hts", q_THD, k) * q_THD.shape[-1] ** -0.5
        hidden = llama.causal(len(q_THD), len(k))
        weights.append(scores.masked_fill(hidden, -torch.inf).softmax(-1))
        return torch.einsum("hts,shd->thd", weights[-1], v)

    stream = [model.embed[ids]]
    for i in range(len(model.layers)):
        stream.append(model.layer(i, stream[-1], list(range(len(ids))), attend))
    return torch.stack(weights), stream[1:]


def heat(weights: Tensor, words: list[str]) -> None:
    figure = Figure(figsize=(10, 3.6))
    for place, (layer, head, says) in enumerate(HEADS, 1):
        axes = figure.add_subplot(1, len(HEADS), place)
        axes.pcolormesh(weights[layer, head].numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.invert_yaxis()
        axes.set_title(f"layer {layer}, head {head}:\n{says}", fontsize=9)
        ticks = [t + 0.5 for t in range(len(words))]
        axes.set_xticks(ticks, words, rotation=90)
        axes.set_yticks(ticks, words if place == 1 else [])
    save(figure, "03-attention")
    at = len(words) - 1
    for layer, head, _ in HEADS:
        best = int(weights[layer, head, at].argmax())
        print(f"layer {layer}, head {head}: {words[at]!r} looks at {words[best]!r},", end=" ")
        print(f"{weights[layer, head, at, best]:.0%}")


def first(weights: Tensor) -> None:
    """How much of every layer's attention goes to the first token."""
    shares = weights[:, :, 1:, 0].mean((1, 2)).tolist()
    figure = Figure(figsize=(6, 2))
    axes = figure.add_subplot()
    axes.bar(range(len(shares)), shares, color=BLUE)
    axes.set_xlabel("layer")
    axes.set_ylabel("to the first token")
    save(figure, "03-first-token")
    print(f"to the first token: {sum(shares) / len(shares):.0%} of all attention")


def lens(model: llama.Llama, stream: list[Tensor]) -> None:
    """The head's product of the stream behind every layer, at the last token."""
    figure = Figure(figsize=(6, 2.4))
    axes = figure.add_subplot()
    probabilities = [model.logits(x_TC[-1:])[0].softmax(-1) for x_TC in stream]
    (rome,) = model.encode(" Rome")
    bars = [float(p[rome]) for p in probabilities]
    bests = [int(p.argmax()) for p in probabilities]
    colours = [ORANGE if best == rome else GREY for best in bests]
    axes.bar(range(len(bars)), [float(p.max()) for p in probabilities], color=colours)
    axes.plot(range(len(bars)), bars, color=BLUE, label="probability of ' Rome'")
    for i in range(len(bars) - 7, len(bars)):
        axes.text(i, float(probabilities[i].max()) + 0.02, repr(model.decode([bests[i]])),
                  rotation=60, fontsize=7)  # fmt: skip
    axes.set_xlabel("layer")
    axes.set_ylabel("of the likeliest token")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    save(figure, "03-lens")
    said = [
        f"{i}: {model.decode([bests[i]])!r} {bars[i]:.1%}" for i in range(len(bars) - 6, len(bars))
    ]
    print("behind layer, the likeliest token, and the probability of ' Rome':", "; ".join(said))


def shifted(model: llama.Llama, ids: list[int]) -> float:
    """The largest difference of a logit when the whole text stands 1,000 positions later."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return llama.attention(q, k, v, llama.causal(len(q), len(k)))

    here, there = (
        model.forward(ids, list(range(start, start + len(ids))), attend) for start in (0, 1000)
    )
    return float((here - there).abs().max())


if __name__ == "__main__":
    main()
