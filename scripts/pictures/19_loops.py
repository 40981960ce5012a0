"""The same server asked in a closed and in an open loop.

python scripts/pictures/19_loops.py [--measure]

Draws 19-loops.json, which --measure writes anew: a minute on a machine at rest.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
from typing import Any

import aiohttp
from drawing import BLUE, ORANGE, PICTURES, ROOT, save
from matplotlib.figure import Figure

from ruvon.bench import Load, find_model, open_session, random_requests, run_load, summarize

sys.path.insert(0, str(ROOT / "bench"))
from process import free_port, running

SECONDS = 5  # of each run, about
CLOSED = (1, 2, 4, 8, 16)  # requests at once
SHARES = (0.3, 0.6, 0.8, 1.0, 1.2)  # of the rate that the closed loop has reached
DATA = PICTURES / "19-loops.json"


def main() -> None:
    if "--measure" in sys.argv:
        port = free_port()
        command = [sys.executable, "-m", "ruvon", "serve", "--port", str(port)]
        with running([*command, "--max-num-seqs", "16", "--no-enable-prefix-caching"], port) as up:
            DATA.write_text(json.dumps(asyncio.run(measure(up.url))))
    draw(json.loads(DATA.read_text()))


async def measure(url: str) -> dict[str, list[dict[str, Any]]]:
    closed, opened = [], []
    async with open_session() as session:
        model = await find_model(session, url)
        fastest = 2.0  # requests a second, of one at a time
        for limit in (1, *CLOSED):  # the first run is for warming up
            num = max(math.ceil(SECONDS * fastest), 2 * limit)
            result = await ask(session, url, model, num, max_concurrency=limit)
            fastest = max(fastest, result["request_throughput"])
            closed.append({"limit": limit, **result})
        for share in SHARES:
            num = math.ceil(SECONDS * share * fastest)
            result = await ask(session, url, model, num, rate=share * fastest)
            opened.append({"rate": share * fastest, **result})
    return {"closed": closed[1:], "open": opened}


async def ask(
    session: aiohttp.ClientSession, url: str, model: str, num: int, **how: Any
) -> dict[str, Any]:
    requests = random_requests(random.Random(num), num, 64, 64)
    samples, duration = await run_load(session, url, Load(model, requests, **how))
    result = summarize(samples, duration)
    wanted = ("request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms")
    print(how, {name: round(result[name], 1) for name in wanted}, flush=True)
    return {name: result[name] for name in wanted}


def draw(runs: dict[str, list[dict[str, Any]]]) -> None:
    figure = Figure(figsize=(8, 4.6))
    labels = {"limit": "requests at once (closed)", "rate": "requests a second (open)"}
    for column, (points, key) in enumerate(((runs["closed"], "limit"), (runs["open"], "rate")), 1):
        at = [point[key] for point in points]
        top, bottom = (figure.add_subplot(2, 2, column + row) for row in (0, 2))
        top.plot(at, [point["output_throughput"] for point in points], "o-", color=BLUE)
        top.set_ylim(0, 1.15 * max(p["output_throughput"] for run in runs.values() for p in run))
        bottom.plot(at, [p["p99_ttft_ms"] for p in points], "o-", color=ORANGE, label="p99")
        bottom.plot(at, [p["median_ttft_ms"] for p in points], "o-", color=BLUE, label="p50")
        bottom.set_yscale("log")
        bottom.set_xlabel(labels[key])
        if column == 1:
            top.set_ylabel("output tokens/s")
            bottom.set_ylabel("first token, ms")
            bottom.legend(frameon=False)
    figure.tight_layout()
    save(figure, "19-loops")


if __name__ == "__main__":
    main()
