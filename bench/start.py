"""Measure starting: words about the command line, and `ruvon serve` until it is ready.

    python bench/start.py [--repeats 10] [--beside CHECKOUT] [-- SERVE OPTIONS]

Prints the median and the least of wall time and of processor time (user and system), which says
more where others use the cores too. With another checkout of ruvon beside this one, the two take
turns.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from measure import machine
from process import TICKS, environment, family, free_port, running, stat_fields

HERE = Path(__file__).parent.parent
USER, SYSTEM = 11, 12  # of `stat_fields`
WORDS = {
    "ruvon --help": ["--help"],
    "ruvon serve --help": ["serve", "--help"],
    "a wrong setting": ["serve", "--port", "70000"],
    "ruvon models": ["models"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--beside", type=Path, help="Another checkout.")
    parser.add_argument("options", nargs="*", help="Passed on to ruvon serve, after --.")
    args = parser.parse_args()
    checkouts = [path.resolve() for path in (HERE, args.beside) if path]
    found: dict[tuple[str, Path], list[tuple[float, float]]] = defaultdict(list)
    for _ in range(args.repeats):
        for checkout in checkouts:
            found["python", checkout].append(run(["-c", "pass"], checkout))
            for name, words in WORDS.items():
                found[name, checkout].append(run(["-m", "ruvon", *words], checkout))
            found["ruvon serve: ready", checkout].append(serve(args.options, checkout))
    print_table(found, checkouts)


def run(command: Sequence[str], checkout: Path) -> tuple[float, float]:
    """(wall, processor) seconds of one command."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *command],
        env=environment(checkout),
        cwd=checkout,
        capture_output=True,
        check=False,  # one of them is meant to fail
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def serve(options: Sequence[str], checkout: Path) -> tuple[float, float]:
    """(wall, processor) seconds until the server is ready."""
    port = free_port()
    command = [sys.executable, "-m", "ruvon", "serve", "--port", str(port), *options]
    with running(command, port, env=environment(checkout)) as server:
        return server.ready_seconds, sum(map(cpu_seconds, family(server.pid)))


def cpu_seconds(pid: int) -> float:
    fields = stat_fields(Path(f"/proc/{pid}/stat"))
    return (int(fields[USER]) + int(fields[SYSTEM])) / TICKS


def print_table(
    found: dict[tuple[str, Path], list[tuple[float, float]]], checkouts: Sequence[Path]
) -> None:
    where = machine()
    print(f"ruvon {where['ruvon']} on {where['cpu']}, {where['cores']} cores\n")
    print("|" + "".join(f" | {path.name}: wall | processor" for path in checkouts) + " |")
    print("|---" + "|---:" * 2 * len(checkouts) + "|")
    for name in dict.fromkeys(name for name, _ in found):
        cells = ""
        for checkout in checkouts:
            for seconds in zip(*found[name, checkout], strict=True):
                cells += f" | {statistics.median(seconds):.2f} s ({min(seconds):.2f})"
        print(f"| {name}{cells} |")


if __name__ == "__main__":
    main()
