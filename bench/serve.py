"""Measure `ruvon serve` over HTTP: one stream, long prompts, many streams, start and memory.

    python bench/serve.py [--model MODEL] [-- SERVE OPTIONS]

Prints a table and writes bench/results/serve-DATE.json.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

from measure import CONCURRENCIES, Target, machine, measure_server, write
from process import Neighbours, Server, free_port, running

from ruvon.bench import find_model, open_session

ROWS = {
    "itl_ms": ("time between tokens, one stream", "ms"),
    "decode_tok_s": ("decode, one stream", "tok/s"),
    "ttft_512_ms": ("first token of a 512-token prompt", "ms"),
    **{
        f"output_tok_s_{c}": (f"output at concurrency {c} (128 + 128)", "tok/s")
        for c in CONCURRENCIES
    },
    "ttft_ms_32": ("first token at concurrency 32, median", "ms"),
    "mixed_itl_p99_ms": ("between tokens under mixed load, p99", "ms"),
    "ready_s": ("ready after", "s"),
    "ready_memory_mb": ("memory when ready", "MB"),
    "peak_memory_mb": ("peak memory", "MB"),
    "others_pct": ("of the machine used by other programs", "%"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Default: the embedded one.")
    parser.add_argument("options", nargs="*", help="Passed on to ruvon serve, after --.")
    args = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "ruvon", "serve", *([args.model] if args.model else [])]
    command += ["--port", str(port), "--log-level", "warning", *args.options]
    neighbours = Neighbours()
    with running(command, port) as server:
        numbers = asyncio.run(run(server))
    numbers["others_pct"] = 100 * neighbours.share()
    print_table(numbers)
    path = write("serve", {"machine": machine(), "command": command[1:], "numbers": numbers})
    print(f"\nWrote {path}")


async def run(server: Server) -> dict[str, Any]:
    async with open_session() as session:
        target = Target(session, server.url, await find_model(session, server.url))
        return await measure_server(server, target, CONCURRENCIES)


def print_table(numbers: dict[str, Any]) -> None:
    where = machine()
    print(f"ruvon {where['ruvon']} on {where['cpu']}, {where['cores']} cores\n")
    print(f"| {'measured':<40} | {'value':>10} | unit  |\n|{'-' * 42}|{'-' * 11}:|-------|")
    for name, (label, unit) in ROWS.items():
        digits = 1 if numbers[name] < 100 else 0
        print(f"| {label:<40} | {numbers[name]:>10.{digits}f} | {unit:<5} |")


if __name__ == "__main__":
    main()
