"""What the front end costs beside the steps: the work of each of a server's threads, per token.

    python bench/frontend.py [--streams 32] [--sampler PY-SPY] [-- SERVE OPTIONS]

With ``--sampler``, a py-spy program (``pip install py-spy``), it also tells what the event loop's
thread was doing, as shares of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from measure import Target
from process import TICKS, free_port, running, stat_fields

from ruvon.bench import find_model, open_session

KINDS = {  # the first that a stack has a part of
    "detokenizing": ("text_stream",),
    "sockets": ("StreamResponse.write", "http_writer"),
    "deltas, stop strings": ("detokenizer.py",),
    "JSON and SSE": ("send_events", "writers/"),
    "schedule, lay out, launch": ("Engine.launch",),
    "collect": ("Engine.collect",),
    "deliver, metrics": ("_deliver", "_record_step"),
    "answers": ("generation.py",),
    "requests": ("requests.py", "schemas.py", "middleware.py"),
}
IDLE = "waiting, uvloop"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--sampler", help="Path of py-spy.")
    parser.add_argument("options", nargs="*", help="Passed on to ruvon serve, after --.")
    args = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "ruvon", "serve", "--port", str(port)]
    with running([*command, "--log-level", "warning", *args.options], port) as server:
        asyncio.run(run(server.url, server.pid, args.streams, args.sampler))


async def run(url: str, pid: int, streams: int, sampler: str | None) -> None:
    async with open_session() as session:
        target = Target(session, url, await find_model(session, url))
        await target.run(2, 32, 16, 2)
        before = ticks(pid)
        samples, duration = await target.run(max(4 * streams, 16), 32, 128, streams)
        after, tokens = ticks(pid), sum(sample.num_output for sample in samples)
        print(f"{streams} streams, {tokens / duration:.0f} tokens/s; us of work a token:")
        for thread, work in after.items():
            spent = work - before.get(thread, 0)
            if spent:
                name = "event loop" if thread == pid else "a step's thread"
                print(f"    {name:16s} {1e6 * spent / TICKS / tokens:8.0f}")
        if sampler:
            load = asyncio.create_task(target.run(max(4 * streams, 16), 32, 128, streams))
            await asyncio.to_thread(print_shares, sampler, pid)
            await load


def ticks(pid: int) -> dict[int, int]:
    """What each thread of a process has worked."""
    found = {}
    for path in Path(f"/proc/{pid}/task").iterdir():
        fields = stat_fields(path / "stat")
        found[int(path.name)] = int(fields[11]) + int(fields[12])
    return found


def print_shares(sampler: str, pid: int) -> None:
    """Look at the event loop's stack 250 times a second for a while."""
    with tempfile.NamedTemporaryFile() as stacks:
        command = [sampler, "record", "--idle", "-p", str(pid), "-d", "8", "-r", "250"]
        subprocess.run([*command, "-f", "raw", "-o", stacks.name], check=True, capture_output=True)
        counts = count_kinds(Path(stacks.name).read_text().splitlines())
    print("    of the event loop's time:")
    for kind, count in counts.most_common():
        print(f"    {kind:28s} {100 * count / counts.total():5.1f} %")


def count_kinds(lines: list[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        if "serve (ruvon/server/app.py" in stack:
            counts[kind_of(stack)] += int(count)
    return counts


def kind_of(stack: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in stack for part in parts):
            return kind
    return IDLE if "asyncio/runners.py" in stack.rpartition(";")[2] else "other"


if __name__ == "__main__":
    main()
