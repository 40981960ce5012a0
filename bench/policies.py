"""The three ways of batching, on the same arrivals: sequential, static, continuous.

    python bench/policies.py [--num 32] [--rate 4] [-- SERVE OPTIONS]

Requests arrive at random moments with outputs of 16 to 160 tokens, so that a batch's members end
at different times: that is where the three differ.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from typing import Any

from measure import machine, write
from process import free_port, running

from ruvon.bench import Load, find_model, open_session, random_prompt, run_load
from ruvon.bench.result import summarize

POLICIES = ("sequential", "static", "continuous")
COLUMNS = {
    "output_throughput": "output tok/s",
    "median_ttft_ms": "first token p50 ms",
    "p99_ttft_ms": "first token p99 ms",
    "median_itl_ms": "between tokens p50 ms",
    "median_e2el_ms": "whole request p50 ms",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--rate", type=float, default=4.0, help="Arrivals per second.")
    parser.add_argument("options", nargs="*", help="Passed on to ruvon serve, after --.")
    args = parser.parse_args()
    numbers = {policy: measure(policy, args) for policy in POLICIES}
    print("| batching   | " + " | ".join(COLUMNS.values()) + " |")
    print(
        "|------------|" + "|".join("-" * (len(name) + 1) + ":" for name in COLUMNS.values()) + "|"
    )
    for policy, row in numbers.items():
        cells = [f"{row[key]:>{len(name)}.0f}" for key, name in COLUMNS.items()]
        print(f"| {policy:<10} | " + " | ".join(cells) + " |")
    print(f"\nWrote {write('policies', {'machine': machine(), 'numbers': numbers})}")


def measure(policy: str, args: argparse.Namespace) -> dict[str, Any]:
    port = free_port()
    command = [sys.executable, "-m", "ruvon", "serve", "--port", str(port), "--batching", policy]
    with running([*command, "--log-level", "warning", *args.options], port) as server:
        return asyncio.run(run(server.url, args.num, args.rate))


async def run(url: str, num: int, rate: float) -> dict[str, Any]:
    rng = random.Random(0)
    requests = [(random_prompt(rng, 64), rng.randint(16, 160)) for _ in range(num)]
    async with open_session() as session:
        model = await find_model(session, url)
        await run_load(session, url, Load(model, [(random_prompt(rng, 32), 16)]))
        samples, duration = await run_load(session, url, Load(model, requests, rate=rate))
    return summarize(samples, duration)


if __name__ == "__main__":
    main()
