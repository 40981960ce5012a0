"""Lesson 7: read the weights once for several sequences: a batch, padded to a rectangle.

python docs/series/code/07_static_batch.py
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from time import process_time

import llama
import torch
from torch import Tensor

kv_cache = import_module("03_kv_cache")

WORK = (("The capital of France is", 3), ("One, two, three, four,", 9), ("Water boils at", 3),
        ("My favourite animal is the", 3))  # fmt: skip


@dataclass
class Count:
    """Rows are positions of a step: they cost the same whether anybody wants them or not."""

    steps: int = 0
    rows: int = 0
    wanted: int = 0


class Batch:
    """Sequences of equal length, padded on the left: row b of the cache is sequence b's."""

    def __init__(self, model: llama.Llama, prompts: list[list[int]], most: int) -> None:
        self.model, self.size = model, len(prompts)
        self.width = max(map(len, prompts))
        self.pads = [self.width - len(prompt) for prompt in prompts]
        shape = (len(model.layers), self.size, self.width + most, model.groups, model.head_dim)
        self.k, self.v = torch.zeros(shape), torch.zeros(shape)
        self.length = 0

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """[B * t, H, D] → the same. Each sequence looks at its own row, and at no padding."""
        new = len(q_THD) // self.size
        total = self.length + new
        outs = []
        for b, rows in enumerate(torch.arange(len(q_THD)).view(self.size, new)):
            self.k[layer, b, self.length : total] = k_TGD[rows]
            self.v[layer, b, self.length : total] = v_TGD[rows]
            hidden = llama.causal(new, total)
            hidden[:, : self.pads[b]] = True
            hidden[:, total - new :].fill_diagonal_(False)  # a pad sees itself: no row is empty
            k, v = self.k[layer, b, :total], self.v[layer, b, :total]
            outs.append(llama.attention(q_THD[rows], k, v, hidden))
        return torch.cat(outs)

    def step(self, ids: list[list[int]]) -> list[int]:
        """One pass over a rectangle of tokens → the next token of each sequence."""
        new = len(ids[0])
        positions = [max(self.length + t - pad, 0) for pad in self.pads for t in range(new)]
        x_TC = self.model.embed[[id for row in ids for id in row]]
        for i in range(len(self.model.layers)):
            x_TC = self.model.layer(i, x_TC, positions, self.attend)
        self.length += new
        return self.model.logits(x_TC[new - 1 :: new]).argmax(-1).tolist()


def run(model: llama.Llama, work: list[tuple[list[int], int]], count: Count) -> list[list[int]]:
    """A batch from its first step to the end of its longest answer."""
    prompts = [prompt for prompt, _ in work]
    longest = max(most for _, most in work)
    batch = Batch(model, prompts, longest)
    pending = [[model.end] * pad + prompt for pad, prompt in zip(batch.pads, prompts, strict=True)]
    answers: list[list[int]] = [[] for _ in work]
    for _ in range(longest):
        tokens = batch.step(pending)
        count.steps += 1
        count.rows += sum(map(len, pending))
        for answer, token, (prompt, most) in zip(answers, tokens, work, strict=True):
            if len(answer) < most:
                count.wanted += 1 if answer else len(prompt)
                answer.append(token)
        pending = [[token] for token in tokens]
    return answers


def main() -> None:
    model = llama.load()
    work = [(model.encode(text), most) for text, most in WORK]
    outputs = {}
    for name, batches in (
        ("before, one at a time", [[w] for w in work]),
        ("after, a batch", [work]),
    ):
        count, start = Count(), process_time()
        outputs[name] = [answer for batch in batches for answer in run(model, batch, count)]
        took = process_time() - start
        print(
            f"{name}: {count.steps} steps, {count.rows} rows, {count.wanted} of them wanted,",
            end=" ",
        )
        print(f"~{took:.2f} s")
    one, other = outputs.values()
    print(f"the same tokens: {one == other}")
    for (text, _), answer in zip(WORK, other, strict=True):
        print(f"  {text!r} → {model.decode(answer)!r}")


if __name__ == "__main__":
    main()
