"""What each further token takes without and with a cache.

python scripts/pictures/03_growth.py
"""

from __future__ import annotations

from importlib import import_module
from time import perf_counter

from drawing import BLUE, ORANGE, llama, save
from matplotlib.figure import Figure

NEW = 48


def main() -> None:
    model = llama.load()
    prompt = model.encode("Once upon a time there was a")
    figure = Figure(figsize=(6, 2.6))
    axes = figure.add_subplot()
    for name, colour, label in (
        ("02_greedy", ORANGE, "the whole text for each token (part 2)"),
        ("03_kv_cache", BLUE, "with a cache (part 3)"),
    ):
        times = measure(import_module(name).generate(model, prompt, NEW))
        axes.plot(range(1, len(times) + 1), times, color=colour, label=label)
        first, last = sorted(times[1:11])[5], sorted(times[-10:])[5]
        print(f"{name}: {first:.0f} ms at the beginning, {last:.0f} ms at {len(times)} tokens")
    axes.set_xlabel("tokens of the answer")
    axes.set_ylabel("ms for the next one")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save(figure, "03-growth")


def measure(tokens) -> list[float]:  # noqa: ANN001
    """Milliseconds from one token to the next."""
    times, before = [], perf_counter()
    for _ in tokens:
        now = perf_counter()
        times.append((now - before) * 1000)
        before = now
    return times


if __name__ == "__main__":
    main()
