"""What one further token takes, without and with a cache, by the length of the text.

    python scripts/pictures/03_growth.py

Processor time on one thread, the least of three.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from time import process_time

import torch
from drawing import BLUE, ORANGE, llama, save
from matplotlib.figure import Figure

forward_pass, kv_cache = import_module("01_forward_pass"), import_module("03_kv_cache")

LENGTHS = (16, 64, 128, 256, 384)


def main() -> None:
    torch.set_num_threads(1)
    model = llama.load()
    text = (model.encode("Once upon a time there was a cache. ") * 50)[: LENGTHS[-1]]
    whole, cached = [], []
    cache = kv_cache.Cache(model, LENGTHS[-1])
    for length in LENGTHS:
        whole.append(least(lambda n=length: forward_pass.last_logits(model, text[:n])))
        kv_cache.step(model, cache, text[cache.length : length - 1])
        cached.append(least(lambda n=length: again(model, cache, text[n - 1])))
    figure = Figure(figsize=(6, 2.6))
    axes = figure.add_subplot()
    axes.plot(LENGTHS, whole, "o-", color=ORANGE, label="the whole text again (part 2)")
    axes.plot(LENGTHS, cached, "o-", color=BLUE, label="with a cache (part 3)")
    axes.set_xlabel("tokens of the text")
    axes.set_ylabel("ms for the next one")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save(figure, "03-growth")
    for length, before, after in zip(LENGTHS, whole, cached, strict=True):
        print(f"{length} tokens: {before:.0f} ms without, {after:.0f} ms with a cache")


def again(model: llama.Llama, cache: kv_cache.Cache, token: int) -> None:
    """One token's step, after which the cache is as long as before."""
    kv_cache.step(model, cache, [token])
    cache.length -= 1


def least(work: Callable[[], object]) -> float:
    """Milliseconds of processor time."""
    times = []
    for _ in range(3):
        start = process_time()
        work()
        times.append(process_time() - start)
    return min(times) * 1000


if __name__ == "__main__":
    main()
