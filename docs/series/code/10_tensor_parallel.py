"""Lesson 10: one model on three ranks, each of which holds a third of every layer.

A rank is a thread here, with weights, keys and values of its own. What each of them holds, and
where they have to meet, is the same as on three devices.

python docs/series/code/10_tensor_parallel.py
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib import import_module
from threading import Barrier

import llama
import torch
from torch import Tensor

kv_cache = import_module("03_kv_cache")

RANKS = 3
PROMPT = "The three primary colours are"
NEW = 8


class Meeting:
    """Where ranks hand in a tensor each and take all of them home."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = 0
        self._barrier = Barrier(size)
        self._parts: list[Tensor] = [torch.empty(0)] * size

    def gather(self, rank: int, x: Tensor) -> list[Tensor]:
        self._parts[rank] = x
        self.count += rank == 0
        self._barrier.wait()  # until everybody has handed in
        parts = [*self._parts]
        self._barrier.wait()  # until everybody has taken
        return parts

    def reduce(self, rank: int, x: Tensor) -> Tensor:
        """The sum, on every rank in the order of ranks: in another order it has other bits."""
        first, *others = self.gather(rank, x)
        return sum(others, start=first)


def cut(weight: Tensor, *sizes: int, rank: int, of: int) -> Tensor:
    """A rank's rows of matrices that lie one above the other."""
    return torch.cat([part.chunk(of)[rank] for part in weight.split(sizes)]).contiguous()


def share_of(model: llama.Llama, rank: int, meeting: Meeting) -> llama.Llama:
    """The model with a part of the heads, of the MLP's width and of the vocabulary."""
    queries, keys = model.heads * model.head_dim, model.groups * model.head_dim
    width = model.layers[0]["down"].shape[1]
    mine = partial(cut, rank=rank, of=meeting.size)
    layers = tuple(
        {
            **layer,
            "qkv": mine(layer["qkv"], queries, keys, keys),  # rows: some heads
            "o": mine(layer["o"].T, queries).T,  # the columns that read these heads
            "gate_up": mine(layer["gate_up"], width, width),
            "down": mine(layer["down"].T, width).T,
        }
        for layer in model.layers
    )
    return replace(
        model,
        embed=mine(model.embed, len(model.embed)),
        layers=layers,
        heads=model.heads // meeting.size,
        groups=model.groups // meeting.size,
        reduce=partial(meeting.reduce, rank),  # what a layer does with its two sums
    )


def embed(model: llama.Llama, rank: int, ids: list[int]) -> Tensor:
    """Each id's row, from the rank that has it: the others give zeros."""
    own = torch.tensor(ids) - rank * len(model.embed)
    inside = (own >= 0) & (own < len(model.embed))
    return model.reduce(model.embed[own.where(inside, 0)] * inside.unsqueeze(1))


def generate(model: llama.Llama, rank: int, meeting: Meeting) -> tuple[list[int], Tensor]:
    """→ (tokens, the last logits). Every rank runs these lines, and finds the same tokens."""
    tokens, pending = [], model.encode(PROMPT)
    cache = kv_cache.Cache(model, len(pending) + NEW)  # of this rank's heads
    while len(tokens) < NEW:
        positions = [*range(cache.length, cache.length + len(pending))]
        x_TC = embed(model, rank, pending)
        for i in range(len(model.layers)):
            x_TC = model.layer(i, x_TC, positions, cache.attend)
        logits = torch.cat(meeting.gather(rank, model.logits(x_TC[-1:])[0]))
        cache.length += len(pending)
        pending = [int(logits.argmax())]
        tokens += pending
    return tokens, logits


def main() -> None:
    model, results = llama.load(), []
    for size in (1, RANKS):
        meeting = Meeting(size)
        parts = [share_of(model, rank, meeting) for rank in range(size)]
        weights = [parts[0].embed, *(w for layer in parts[0].layers for w in layer.values())]
        held = sum(w.nbytes for w in weights) / 1e6
        with ThreadPoolExecutor(size) as pool:
            done = [*pool.map(generate, parts, range(size), [meeting] * size)]
        assert all(tokens == done[0][0] for tokens, _ in done)
        met = meeting.count // NEW if size > 1 else 0  # one rank meets itself only
        print(f"{size} rank(s): {held:.0f} MB each, {met} meetings a step")
        results.append(done[0])
    (alone, logits), (together, others) = results
    print(f"the same tokens: {alone == together}")
    print(f"  {model.decode(together)!r}")
    print(f"logits differ by ~{(logits - others).abs().max():.6f} at most")


if __name__ == "__main__":
    main()
