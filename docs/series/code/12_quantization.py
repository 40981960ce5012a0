"""Lesson 12: the same model with its weights in 16, 8 and 4 bits: what it costs, what it buys.

Weights are rounded to a grid and multiplied out again, so that what is left of the model can be
measured: how far its probabilities are from the original's, over the tokens of a text.

python docs/series/code/12_quantization.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple, TypeAlias

import llama
import torch
from torch import Tensor

TEXT = """A language model gives every token of its vocabulary a score. What is read most while it
writes is its weights, all of them, once for each token. Stored in fewer bits they are read sooner,
and the question is how much of what the model knows is lost on the way."""
GROUP = 32

Change: TypeAlias = Callable[[Tensor], Tensor]


def half(weight: Tensor) -> Tensor:
    return weight.half().float()


def int8(weight: Tensor) -> Tensor:
    """code * scale: 32 neighbours share a scale of 16 bits, with which the largest is 127."""
    values = weight.view(-1, GROUP)
    scale = half(values.abs().amax(1, keepdim=True) / 127)
    return ((values / scale).round().clamp(-127, 127) * scale).view_as(weight)


def int4(weight: Tensor, group: int = GROUP) -> Tensor:
    """code * scale + least: 16 steps from the least of a group to its greatest."""
    values = weight.view(-1, group)
    least, greatest = values.aminmax(dim=1, keepdim=True)
    scale, least = half((greatest - least) / 15), half(least)
    return (((values - least) / scale).round().clamp(0, 15) * scale + least).view_as(weight)


def int4_rows(weight: Tensor) -> Tensor:
    """The same with one scale for a whole row: an outlier spoils all of it."""
    return int4(weight, weight.shape[1])


class Format(NamedTuple):
    change: Change
    bits: float  # a weight of a layer
    table: Change  # the embedding, which is the head too
    table_bits: float


FORMATS = {
    "float16": Format(half, 16, half, 16),
    "int8": Format(int8, 8.5, int8, 8.5),
    "int4": Format(int4, 5, int8, 8.5),
    "int4 by rows": Format(int4_rows, 4.05, int8, 8.5),
}


def off_the_grid(model: llama.Llama) -> llama.Llama:
    """The same function with other weights: factors move from norms into the columns behind them,
    and from rows into the columns that read them. The file has 4 bits already, and to round it to
    4 bits once more would show nothing."""
    random = torch.Generator().manual_seed(0)

    def moved(layer: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes = (*layer["qkv"].shape[1:], *layer["gate_up"].shape[1:], *layer["down"].shape[1:])
        a, b, c = (torch.empty(size).uniform_(0.7, 1.4, generator=random) for size in sizes)
        rows = torch.cat((torch.ones_like(c), c)).unsqueeze(1)
        return {
            "attn_norm": layer["attn_norm"] / a,
            "qkv": layer["qkv"] * a,
            "o": layer["o"],
            "mlp_norm": layer["mlp_norm"] / b,
            "gate_up": layer["gate_up"] * b * rows,
            "down": layer["down"] / c,
        }

    return replace(model, layers=tuple(map(moved, model.layers)))


def rounded(model: llama.Llama, form: Format) -> llama.Llama:
    """Norms stay as they are: they are few, and all that follows is multiplied by them."""
    layers = tuple(
        {name: w if w.ndim == 1 else form.change(w) for name, w in layer.items()}
        for layer in model.layers
    )
    return replace(model, layers=layers, embed=form.table(model.embed))


def log_probabilities(model: llama.Llama, ids: list[int]) -> Tensor:
    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return llama.attention(q, k, v, llama.causal(len(q), len(k)))

    return model.forward(ids, [*range(len(ids))], attend).log_softmax(-1)


def bandwidth() -> float:
    """Bytes a second that this machine reads."""
    numbers = torch.ones(1 << 26)
    start = perf_counter()
    numbers.sum()
    return numbers.nbytes / (perf_counter() - start)


def main() -> None:
    model = off_the_grid(llama.load())
    ids, speed = model.encode(TEXT), bandwidth()
    exact = log_probabilities(model, ids)
    size = sum(w.numel() for layer in model.layers for w in layer.values() if w.ndim == 2)
    for name, form in FORMATS.items():
        other = log_probabilities(rounded(model, form), ids)
        distance = (exact.exp() * (exact - other)).sum(-1).mean()
        same = (exact.argmax(-1) == other.argmax(-1)).float().mean()
        read = (size * form.bits + model.embed.numel() * form.table_bits) / 8
        print(f"{name}: a token reads {read / 1e6:.0f} MB, at most ~{speed / read:.0f} a second;")
        print(f"  KL ~{distance:.4f} nats, the same likeliest token at ~{100 * same:.0f} %")


if __name__ == "__main__":
    main()
