"""Lesson 3: keys and values of old tokens never change, so they are kept.

python docs/series/code/03_kv_cache.py
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from time import process_time

import llama
import torch
from torch import Tensor

greedy = import_module("02_greedy")

NEW = 8


class Cache:
    """The keys and values of one sequence: a layer's [most tokens, G, D], filled from the front."""

    def __init__(self, model: llama.Llama, most: int) -> None:
        shape = (len(model.layers), most, model.groups, model.head_dim)
        self.k, self.v = torch.empty(shape), torch.empty(shape)
        self.length = 0  # tokens whose keys are in all layers

    def attend(self, layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """Store the new tokens' keys and values, then look at all."""
        total = self.length + len(k_TGD)
        self.k[layer, self.length : total] = k_TGD
        self.v[layer, self.length : total] = v_TGD
        hidden = llama.causal(len(q_THD), total)
        return llama.attention(q_THD, self.k[layer, :total], self.v[layer, :total], hidden)

    def bytes_per_token(self) -> int:
        return self.k[:, 0].nbytes + self.v[:, 0].nbytes


def step(model: llama.Llama, cache: Cache, ids: list[int]) -> Tensor:
    """Compute tokens that are not in the cache yet → logits [V] behind the last."""
    positions = list(range(cache.length, cache.length + len(ids)))
    x_TC = model.embed[ids]
    for i in range(len(model.layers)):
        x_TC = model.layer(i, x_TC, positions, cache.attend)
    cache.length += len(ids)
    return model.logits(x_TC[-1:])[0]


def generate(model: llama.Llama, prompt: list[int], most: int) -> Iterator[tuple[int, int]]:
    """→ (token, rows that were computed for it)."""
    cache, pending = Cache(model, len(prompt) + most), prompt
    for _ in range(most):
        token = int(step(model, cache, pending).argmax())
        yield token, len(pending)
        if token == model.end:
            return
        pending = [token]


def main() -> None:
    model = llama.load()
    prompt = model.encode("A cache is worth its memory when the same question is asked again, and")
    outputs = {}
    for name, loop in (("before", greedy.generate), ("after", generate)):
        start = process_time()
        made = list(loop(model, prompt, NEW))
        took = process_time() - start
        tokens, rows = zip(*made, strict=True)
        outputs[name] = tokens
        print(f"{name}: {sum(rows)} rows for {NEW} tokens, ~{took:.2f} s")
    print(f"the same tokens: {outputs['before'] == outputs['after']}")
    print(f"  {model.decode(list(outputs['after']))!r}")

    cache = Cache(model, 1)
    a_token = cache.bytes_per_token()
    print(f"\na token's keys and values: {a_token:,} bytes in float32")
    print("  2 (k, v) x 30 layers x 3 key/value heads x 64 numbers x 4 bytes")
    print(f"  with a key/value head for each of 9 query heads: {a_token * 3:,}")
    print(f"  a conversation of 8,192 tokens: {a_token * 8192 / 1e6:.0f} MB, half that in float16")


if __name__ == "__main__":
    main()
