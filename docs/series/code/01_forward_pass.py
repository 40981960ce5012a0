"""Lesson 1: text → ids → one forward pass → a score for every token that could come next.

python docs/series/code/01_forward_pass.py
"""

from __future__ import annotations

from time import process_time

import llama
import torch.nn.functional as F
from torch import Tensor

PROMPT = "The capital of France is"
LONG = "Everything a model says is one of its tokens, chosen from a list of scores. " * 8


def attend(layer: int, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
    """Nothing is kept: each token looks at those before it in the same pass."""
    return llama.attention(q_THD, k_TGD, v_TGD, llama.causal(len(q_THD), len(k_TGD)))


def last_logits(model: llama.Llama, ids: list[int]) -> Tensor:
    """Scores of what follows the whole text, [V]. The other rows never meet the head."""
    x_TC = model.embed[ids]
    for i in range(len(model.layers)):
        x_TC = model.layer(i, x_TC, list(range(len(ids))), attend)
    return model.logits(x_TC[-1:])[0]


def main() -> None:
    model = llama.load()
    ids = model.encode(PROMPT)
    print(f"{PROMPT!r} is {len(ids)} tokens:")
    print("  " + " ".join(f"{id}:{model.decode([id])!r}" for id in ids))
    print(f"'🙂' is {len(model.encode('🙂'))} tokens of bytes, none of them a character")

    logits_TV = model.forward(ids, list(range(len(ids))), attend)
    print(f"one pass gives logits {list(logits_TV.shape)}: a row for each token")
    probabilities = logits_TV.softmax(-1)
    for t in range(len(ids)):
        best = int(logits_TV[t].argmax())
        so_far = model.decode(ids[: t + 1])
        print(f"  after {so_far!r}: {model.decode([best])!r}, {probabilities[t, best]:.0%}")

    ids = model.encode(LONG)
    start = process_time()
    every = model.forward(ids, list(range(len(ids))), attend)
    middle = process_time()
    last = last_logits(model, ids)
    end = process_time()
    same = int(every[-1].argmax()) == int(last.argmax())
    head, all_ = model.embed.numel(), sum(w.numel() for each in model.layers for w in each.values())
    print(f"\na prompt of {len(ids)} tokens; the head is {head / (head + all_):.0%} of the weights")
    print(f"  before: logits of {len(every)} rows, {every.numel() * 4 / 1e6:.1f} MB,", end=" ")
    print(f"~{1000 * (middle - start):.0f} ms")
    print(f"  after: of the last row, {last.numel() * 4 / 1e6:.1f} MB,", end=" ")
    print(f"~{1000 * (end - middle):.0f} ms; the same token: {same}")
    print(f"  how sure it is: {F.softmax(last, -1).max():.0%}")


if __name__ == "__main__":
    main()
