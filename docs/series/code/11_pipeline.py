"""Lesson 11: half of the layers on each of two stages, and what keeps both of them busy.

Time goes by in ticks. In one tick each stage takes a batch through its layers, if it has got one;
what comes out of the last stage goes back to the first, as the next token of each of its sequences.

python docs/series/code/11_pipeline.py
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from time import perf_counter

import llama
import torch
from torch import Tensor

kv_cache = import_module("03_kv_cache")
continuous = import_module("08_continuous_batch")

STAGES = (range(15), range(15, 30))
PROMPTS = ("The sun is", "Water boils at", "A week has", "The capital of Italy is")
NEW = 8


@dataclass
class Batch:
    """Sequences that go from stage to stage together, and the stream they have become so far."""

    name: str
    sequences: list[continuous.Sequence]
    x_TC: Tensor = field(default_factory=lambda: torch.empty(0))

    def attend(self, layer: int, *qkv: Tensor) -> Tensor:
        """Attention is each sequence's own; all else is done for all rows at once."""
        sizes = [len(seq.pending()) for seq in self.sequences]
        parts = zip(*(x.split(sizes) for x in qkv), strict=True)
        pairs = zip(self.sequences, parts, strict=True)
        return torch.cat([seq.cache.attend(layer, *part) for seq, part in pairs])


def compute(model: llama.Llama, stage: int, batch: Batch | None) -> None:
    """What a stage does in a tick. The stream ``x_TC`` is all that the next one needs."""
    if batch is None:
        return
    pending = [seq.pending() for seq in batch.sequences]
    starts = [seq.cache.length for seq in batch.sequences]
    if stage == 0:
        batch.x_TC = model.embed[[id for ids in pending for id in ids]]
    positions = [
        start + t for start, ids in zip(starts, pending, strict=True) for t in range(len(ids))
    ]
    for layer in STAGES[stage]:
        batch.x_TC = model.layer(layer, batch.x_TC, positions, batch.attend)
    if stage == len(STAGES) - 1:
        ends = torch.tensor([len(ids) for ids in pending]).cumsum(0)
        tokens = model.logits(batch.x_TC[ends - 1]).argmax(-1).tolist()
        for seq, ids, token in zip(batch.sequences, pending, tokens, strict=True):
            seq.cache.length += len(ids)
            seq.tokens.append(token)


def run(model: llama.Llama, batches: list[Batch]) -> list[str]:
    """Until every sequence has its tokens → for each stage, who was there in each tick."""
    inboxes: list[deque[Batch]] = [deque(batches), *(deque() for _ in STAGES[1:])]
    lines = ["" for _ in STAGES]
    with ThreadPoolExecutor(len(STAGES)) as stages:
        while any(inboxes):
            now = [inbox.popleft() if inbox else None for inbox in inboxes]
            list(stages.map(partial(compute, model), range(len(STAGES)), now))
            lines = [line + (b.name if b else ".") for line, b in zip(lines, now, strict=True)]
            for batch, following in zip(now, [*inboxes[1:], inboxes[0]], strict=True):
                if batch and (following is not inboxes[0] or len(batch.sequences[0].tokens) < NEW):
                    following.append(batch)
    return lines


def make_batches(model: llama.Llama, count: int) -> list[Batch]:
    """The same sequences, shared out among so many batches."""
    prompts = [model.encode(text) for text in PROMPTS]
    sequences = [
        continuous.Sequence(ids, NEW, kv_cache.Cache(model, len(ids) + NEW), 0) for ids in prompts
    ]
    return [Batch("AB"[i], sequences[i::count]) for i in range(count)]


def main() -> None:
    model, answers = llama.load(), []
    for count in (1, 2):
        batches = make_batches(model, count)
        start = perf_counter()
        lines = run(model, batches)
        took = perf_counter() - start
        busy = 1 - sum(line.count(".") for line in lines) / sum(map(len, lines))
        print(f"{count} batch(es): {len(lines[0])} ticks, stages busy {busy:.0%}, ~{took:.2f} s")
        for layers, line in zip(STAGES, lines, strict=True):
            print(f"  layers {layers.start:2} to {layers.stop - 1}: {line}")
        answers.append(sorted(seq.prompt + seq.tokens for b in batches for seq in b.sequences))
    print(f"the same tokens: {answers[0] == answers[1]}")


if __name__ == "__main__":
    main()
