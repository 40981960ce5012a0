"""Lesson 20: several tokens a step, by guessing what comes and checking all guesses at once.

A guess costs nothing: find where the last tokens stood before, and propose what followed there. A
step computes the newest token and the proposed ones, as if they were a chunk of a prompt. Up to the
first wrong one they are right, and the token behind these is a gift.

python docs/series/code/20_speculation.py
"""

from __future__ import annotations

from importlib import import_module
from time import perf_counter

import llama

kv_cache = import_module("03_kv_cache")

GUESSES = 7  # at most
MATCH = 2  # last tokens that must have stood there before
NEW = 16
TREES = "oak, elm, ash, fir, yew, box, bay, fig, plum, pear, lime, lilac, cedar, maple, birch"
PROMPTS = {
    "copying": f"Trees: {TREES}.\nThe same trees again: oak, elm, ash,",
    "writing": "The king had a son and a daughter. One day the king had",
}


def propose(ids: list[int]) -> list[int]:
    """What followed the last tokens where they stood last before; nothing if they never did."""
    end = ids[-MATCH:]
    for start in range(len(ids) - MATCH - 1, -1, -1):
        if ids[start : start + MATCH] == end:
            return ids[start + MATCH : start + MATCH + GUESSES]
    return []


def accept(guesses: list[int], sampled: list[int]) -> list[int]:
    """``sampled[i]`` is the token behind ``i`` guesses. → those that count: one at least."""
    right = 0
    while right < len(guesses) and guesses[right] == sampled[right]:
        right += 1
    return sampled[: right + 1]


def generate(model: llama.Llama, prompt: str, *, guess: bool) -> tuple[list[int], list[int], int]:
    """→ (tokens, how many each step gave, guesses that were computed). Greedy."""
    ids, steps, guessed = model.encode(prompt), [], 0
    first = len(ids)
    cache = kv_cache.Cache(model, first + NEW)
    while len(ids) < first + NEW:
        guesses = propose(ids)[: first + NEW - len(ids) - 1] if guess else []
        rows = [*ids[cache.length :], *guesses]
        positions = [*range(cache.length, cache.length + len(rows))]
        x_TC = model.embed[rows]
        for i in range(len(model.layers)):
            x_TC = model.layer(i, x_TC, positions, cache.attend)
        sampled = model.logits(x_TC[len(rows) - len(guesses) - 1 :]).argmax(-1).tolist()
        tokens = accept(guesses, sampled)
        ids = [*ids, *tokens]
        cache.length = len(ids) - 1  # what wrong guesses have left behind it is written over
        steps.append(len(tokens))
        guessed += len(guesses)
    return ids[first:], steps, guessed


def main() -> None:
    model = llama.load()
    for name, prompt in PROMPTS.items():
        results = []
        for guess in (False, True):
            start = perf_counter()
            tokens, steps, guessed = generate(model, prompt, guess=guess)
            took = perf_counter() - start
            right = f", {NEW - len(steps)} of {guessed} guesses right" if guess else ""
            how = "with guesses" if guess else "one by one"
            print(f"{name} {how}: {len(steps)} steps for {NEW} tokens, ~{took:.2f} s{right}")
            results.append(tokens)
        print(f"  the same tokens: {results[0] == results[1]}")


if __name__ == "__main__":
    main()
