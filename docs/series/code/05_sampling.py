"""Lesson 5: from scores to one token: temperature, top-k, top-p, and a draw that can be repeated.

python docs/series/code/05_sampling.py
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from time import process_time

import llama
import torch
from numpy.random import Philox
from torch import Tensor

kv_cache = import_module("03_kv_cache")

PROMPT = "My favourite animal is the"


@dataclass(frozen=True)
class Sampling:
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 0


def distribution(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that a token is drawn from, [V]."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), len(logits_V)).float()
    logits_V = logits_V / sampling.temperature
    if sampling.top_k:
        least = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    p_V = logits_V.softmax(-1)
    if sampling.top_p < 1:
        values, order = p_V.sort(descending=True)
        before = values.cumsum(0) - values  # of all that are likelier
        p_V = p_V.index_fill(0, order[before >= sampling.top_p], 0.0)
    return p_V / p_V.sum()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else: no state, so no order of draws."""
    return (int(Philox(key=seed, counter=position).random_raw()) >> 16) * 2.0**-48


def draw(logits_V: Tensor, sampling: Sampling, position: int) -> int:
    """The token whose piece of [0, 1) the uniform number lies in."""
    running = distribution(logits_V, sampling).double().cumsum(0)
    goal = uniform(sampling.seed, position) * running[-1]
    return int(torch.searchsorted(running, goal, right=True))


def entropy(p_V: Tensor) -> float:
    """In bits: how many yes/no questions the choice is worth."""
    kept = p_V[p_V > 0]
    return float((kept * (1 / kept).log2()).sum())


def generate(model: llama.Llama, prompt: list[int], most: int, sampling: Sampling) -> list[int]:
    cache, pending, tokens = kv_cache.Cache(model, len(prompt) + most), prompt, []
    while len(tokens) < most:
        tokens.append(draw(kv_cache.step(model, cache, pending), sampling, len(tokens)))
        pending = tokens[-1:]
    return tokens


def main() -> None:
    model = llama.load()
    prompt = model.encode(PROMPT)
    logits = kv_cache.step(model, kv_cache.Cache(model, len(prompt)), prompt)
    print(f"after {PROMPT!r}:")
    for sampling in (
        Sampling(0),
        Sampling(0.5),
        Sampling(1),
        Sampling(2),
        Sampling(1, top_k=20),
        Sampling(1, top_p=0.9),
    ):
        p = distribution(logits, sampling)
        best = int(p.argmax())
        print(
            f"  T {sampling.temperature:<3} top-k {sampling.top_k:<2} top-p {sampling.top_p:<3}:",
            end=" ",
        )
        print(f"{int((p > 0).sum()):>5} tokens, {entropy(p):5.2f} bits,", end=" ")
        print(f"{model.decode([best])!r} {p[best]:.0%}")

    print(f"\nbefore, greedy:        {model.decode(generate(model, prompt, 6, Sampling(0)))!r}")
    for seed in (2, 6, 2):
        tokens = generate(model, prompt, 6, Sampling(0.8, top_p=0.9, seed=seed))
        print(f"after, drawn, seed {seed}:  {model.decode(tokens)!r}")

    start = process_time()
    for _ in range(20):
        logits.argmax()
    middle = process_time()
    for position in range(20):
        draw(logits, Sampling(1, top_p=0.9), position)
    end = process_time()
    print(f"\na token of {len(logits):,}: greedy ~{(middle - start) * 50:.2f} ms,", end=" ")
    print(f"top-p by sorting ~{(end - middle) * 50:.1f} ms")


if __name__ == "__main__":
    main()
