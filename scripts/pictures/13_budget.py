"""What a prompt of 1,500 tokens does to eight running answers, and they to it, by the budget.

python scripts/pictures/13_budget.py
"""

from __future__ import annotations

from itertools import pairwise

from clock import Run
from drawing import BLUE, GREY, ORANGE, save
from matplotlib.figure import Figure

BUDGETS = (16, 32, 64, 128, 256, 512, 1024, 2048)


def main() -> None:
    gaps, firsts = zip(*map(play, BUDGETS), strict=True)
    for budget, gap, first in zip(BUDGETS, gaps, firsts, strict=True):
        print(f"{budget}: longest gap {gap:.3f} s, first token {first:.3f} s")
    axes = (figure := Figure(figsize=(6, 3.2))).add_subplot()
    axes.plot(BUDGETS, firsts, "o-", color=ORANGE, label="first token of the prompt")
    axes.plot(BUDGETS, gaps, "o-", color=BLUE, label="longest gap in a running answer")
    axes.axvline(512, color=GREY, linestyle=":", label="the default on a CPU")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.set_xlabel("--max-num-batched-tokens")
    axes.set_ylabel("seconds")
    axes.legend(frameon=False)
    save(figure, "13-budget")


def play(budget: int) -> tuple[float, float]:
    """→ (longest gap, seconds to the prompt's first token)."""
    run = Run(places=9, prompt=8, answer=2000, budget=budget)
    running = [run.ask(0.0) for _ in range(8)]
    for _ in range(20):
        run.step()
    long = run.ask(run.now, 1500)
    while not long.first:
        run.step()
    gaps = [b - a for asked in running for a, b in pairwise(asked.tokens) if b > long.at]
    return max(gaps), long.first - long.at


if __name__ == "__main__":
    main()
