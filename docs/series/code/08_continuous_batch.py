"""Lesson 8: decide before every step who is in it. No padding, and nobody waits for a stranger.

python docs/series/code/08_continuous_batch.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from time import process_time

import llama
import torch
from torch import Tensor

kv_cache = import_module("03_kv_cache")

WORK = (("The capital of France is", 3), ("One, two, three, four,", 9), ("Water boils at", 3),
        ("My favourite animal is the", 3), ("The opposite of hot is", 3))  # fmt: skip


@dataclass
class Sequence:
    prompt: list[int]
    most: int
    cache: kv_cache.Cache
    arrived: int  # the step before which it came
    tokens: list[int] = field(default_factory=list)
    first: int = -1  # the step that gave its first token

    def pending(self) -> list[int]:
        """What has not been computed: all of a new prompt, or the one token drawn last."""
        return (self.prompt + self.tokens)[self.cache.length :]


def step(model: llama.Llama, running: list[Sequence]) -> list[int]:
    """One pass over the pending tokens of all, one after another → the next token of each."""
    pending = [seq.pending() for seq in running]
    ids = [id for tokens in pending for id in tokens]
    positions = [
        seq.cache.length + t
        for seq, new in zip(running, pending, strict=True)
        for t in range(len(new))
    ]
    ends = torch.tensor([len(tokens) for tokens in pending]).cumsum(0)

    def attend(layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """Only here does it matter where one sequence ends and the next begins."""
        outs = []
        for seq, end, tokens in zip(running, ends.tolist(), pending, strict=True):
            rows = slice(end - len(tokens), end)
            outs.append(seq.cache.attend(layer, q_THD[rows], k_TGD[rows], v_TGD[rows]))
        return torch.cat(outs)

    x_TC = model.embed[ids]
    for i in range(len(model.layers)):
        x_TC = model.layer(i, x_TC, positions, attend)
    for seq, tokens in zip(running, pending, strict=True):
        seq.cache.length += len(tokens)
    return model.logits(x_TC[ends - 1]).argmax(-1).tolist()


def run(model: llama.Llama, continuous: bool, places: int) -> tuple[list[Sequence], int, int]:
    """One request arrives before each step → (the sequences, steps, rows)."""
    coming = [(model.encode(text), most) for text, most in WORK]
    waiting: list[Sequence] = []
    running: list[Sequence] = []
    done: list[Sequence] = []
    steps = rows = 0
    while coming or waiting or running:
        if coming:
            prompt, most = coming.pop(0)
            cache = kv_cache.Cache(model, len(prompt) + most)
            waiting.append(Sequence(prompt, most, cache, steps))
        if continuous or not running:  # static: a batch ends before the next one begins
            free = places - len(running)
            running, waiting = running + waiting[:free], waiting[free:]
        rows += sum(len(seq.pending()) for seq in running)
        steps += 1
        for seq, token in zip(running, step(model, running), strict=True):
            seq.first = seq.first if seq.tokens else steps
            seq.tokens.append(token)
        done += [seq for seq in running if len(seq.tokens) == seq.most]
        running = [seq for seq in running if len(seq.tokens) < seq.most]
    return sorted(done, key=lambda seq: seq.arrived), steps, rows


def main() -> None:
    model = llama.load()
    texts = []
    for name, continuous in (("before, static", False), ("after, continuous", True)):
        start = process_time()
        done, steps, rows = run(model, continuous, places=3)
        took = process_time() - start
        waits = [seq.first - seq.arrived for seq in done]
        print(
            f"{name}: {steps} steps, {rows} rows, first tokens after {waits} steps, ~{took:.2f} s"
        )
        texts.append([model.decode(seq.tokens) for seq in done])
    print(f"the same tokens: {texts[0] == texts[1]}")
    for (text, _), answer in zip(WORK, texts[1], strict=True):
        print(f"  {text!r} → {answer!r}")


if __name__ == "__main__":
    main()
