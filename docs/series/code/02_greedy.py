"""Lesson 2: text, one token at a time. Always the likeliest token, and the whole text again for it.

python docs/series/code/02_greedy.py
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from time import process_time

import llama

forward_pass = import_module("01_forward_pass")

QUESTION = "Name the capital of France."


def generate(model: llama.Llama, ids: list[int], most: int) -> Iterator[tuple[int, int]]:
    """→ (token, rows that were computed for it), until the model ends its answer."""
    ids = list(ids)
    for _ in range(most):
        token = int(forward_pass.last_logits(model, ids).argmax())
        yield token, len(ids)
        if token == model.end:
            return
        ids.append(token)


def without_end(model: llama.Llama, ids: list[int], most: int) -> list[int]:
    """The loop that everybody writes first: it goes on after the answer is over."""
    ids = list(ids)
    for _ in range(most):
        ids.append(int(forward_pass.last_logits(model, ids).argmax()))
    return ids[-most:]


def main() -> None:
    model = llama.load()
    prompt = model.ask(QUESTION)
    blind = without_end(model, prompt, 12)
    print(f"before, to a fixed length: {text(model, blind)!r}")

    tokens, rows, times = [], [], [process_time()]
    for token, computed in generate(model, prompt, 12):
        tokens.append(token)
        rows.append(computed)
        times.append(process_time())
    print(f"after, to the end of turn: {text(model, tokens)!r}")
    print(f"  {len(tokens)} tokens from a prompt of {len(prompt)}")
    print(f"  rows computed: {' + '.join(map(str, rows))} = {sum(rows)}")
    print(f"  ~{(times[-1] - times[0]) / len(tokens) * 1000:.0f} ms a token")

    weights = model.embed.numel() + sum(w.numel() for each in model.layers for w in each.values())
    print("\nwhere the memory is, for a text of 2,048 tokens in float32:")
    length, width = 2048, model.embed.shape[1]
    print(f"  weights {weights * 4 / 1e6:,.0f} MB, read once for every step")
    print(f"  the stream {length * width * 4 / 1e6:.1f} MB, made anew in every layer")
    print(f"  scores of one layer {model.heads * length**2 * 4 / 1e6:,.0f} MB (part 9)")
    print(f"  logits of every row {length * model.embed.shape[0] * 4 / 1e6:,.0f} MB,", end=" ")
    print(f"of the last {model.embed.shape[0] * 4 / 1e6:.1f} MB")


def text(model: llama.Llama, ids: list[int]) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=False)


if __name__ == "__main__":
    main()
