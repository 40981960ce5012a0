"""What a router finds and how long first tokens take, by how far it lets a replica fall behind.

python scripts/pictures/16_balance.py

Four simulated replicas (bench/simulate.py): real schedulers, caches and router, steps that only
take time. Two minutes of a processor.
"""

from __future__ import annotations

import sys

from drawing import BLUE, GREY, ORANGE, ROOT, save
from matplotlib.figure import Figure

from ruvon.config import RouterConfig

sys.path.insert(0, str(ROOT / "bench"))
import conversations
import simulate

BOUNDS = (0, 1, 2, 4, 8, 16, 32, 64)
COST = simulate.Cost()
BLOCKS = 1024  # of 16 tokens: a replica's cache


def main() -> None:
    load = list(conversations.mix(rate=3.0, seconds=45, seed=3))
    turns = sum(len(each.turns) for each in load)
    print(f"{len(load)} conversations, {turns} turns")
    routed = [play(load, "router", bound) for bound in BOUNDS]
    in_turns = play(load, "round robin", 0)
    figure = Figure(figsize=(8, 3))
    places = range(len(BOUNDS))
    hits, p50, p99 = zip(*routed, strict=True)
    axes = figure.add_subplot(1, 2, 1)
    axes.plot(places, [100 * share for share in hits], "o-", color=BLUE)
    axes.axhline(100 * in_turns[0], color=GREY, linestyle="--")
    axes.set_ylabel("% of prompt tokens found")
    axes.set_ylim(0, 100)
    times = figure.add_subplot(1, 2, 2)
    times.plot(places, p99, "o-", color=ORANGE, label="first token, p99")
    times.plot(places, p50, "o-", color=BLUE, label="first token, p50")
    for value in in_turns[1:]:
        times.axhline(value, color=GREY, linestyle="--")
    times.set_yscale("log")
    times.set_ylabel("seconds")
    times.legend(frameon=False)
    for each in (axes, times):
        each.set_xticks(places, [str(bound) for bound in BOUNDS])
        each.set_xlabel("--max-imbalance; dashed: in turns")
    figure.tight_layout()
    save(figure, "16-balance")


def play(
    load: list[conversations.Conversation], route: str, bound: int
) -> tuple[float, float, float]:
    """→ (share of prompt tokens found, seconds to the first token, p50 and p99)."""
    done = simulate.Simulation(
        load,
        simulate.ROUTES[route],
        cost=COST,
        num_blocks=BLOCKS,
        router=RouterConfig(max_imbalance=bound),
    ).run()
    first = done.first_tokens()
    p50, p99 = (simulate.percentile(first, share) for share in (0.5, 0.99))
    print(f"{route}, {bound}: {done.hits:.1%}, {p50:.3f} s, {p99:.2f} s", flush=True)
    return done.hits, p50, p99


if __name__ == "__main__":
    main()
