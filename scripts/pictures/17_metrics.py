"""A server of the embedded model under a load that rises, as its own /metrics tell it.

python scripts/pictures/17_metrics.py [--measure]

Draws 17-metrics.json, which --measure writes anew: half a minute on a machine at rest.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

import aiohttp
from drawing import BLUE, GREY, ORANGE, PICTURES, ROOT, save
from matplotlib.figure import Figure
from prometheus_client.parser import text_string_to_metric_families

from ruvon.bench import Load, find_model, open_session, random_requests, send

sys.path.insert(0, str(ROOT / "bench"))
from process import free_port, running

SECONDS, PLACES = 32, 8
FASTEST = 8.0  # requests a second at the end
DATA = PICTURES / "17-metrics.json"


def main() -> None:
    if "--measure" in sys.argv:
        port = free_port()
        command = [sys.executable, "-m", "ruvon", "serve", "--port", str(port)]
        with running([*command, "--max-num-seqs", str(PLACES)], port) as server:
            DATA.write_text(json.dumps(asyncio.run(measure(server.url))))
    draw(json.loads(DATA.read_text()))


async def measure(url: str) -> list[dict[str, float]]:
    """What /metrics says every half second while requests come faster and faster."""
    rng = random.Random(0)
    requests = random_requests(rng, 1000, 48, 48, 0.5)
    samples: list[dict[str, float]] = []
    async with open_session() as session:
        load = Load(await find_model(session, url), [])
        begin = time.monotonic()
        tasks = [asyncio.create_task(watch(session, url, samples, begin))]
        while (now := time.monotonic() - begin) < SECONDS:
            payload = load.payload(*requests.pop())
            tasks.append(asyncio.create_task(send(session, url + "/v1/completions", payload)))
            await asyncio.sleep(rng.expovariate(0.5 + FASTEST * now / SECONDS))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return samples


async def watch(
    session: aiohttp.ClientSession, url: str, samples: list[dict[str, float]], begin: float
) -> None:
    while True:
        async with session.get(url + "/metrics") as response:
            families = text_string_to_metric_families(await response.text())
            values = {s.name: s.value for family in families for s in family.samples}
        samples.append({"at": time.monotonic() - begin} | {n: values[n] for n in WANTED})
        await asyncio.sleep(0.5)


WANTED = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_sum",
    "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:inter_token_latency_seconds_count",
)


def draw(samples: list[dict[str, float]]) -> None:
    at = [sample["at"] for sample in samples]
    figure = Figure(figsize=(8, 5))
    panels = [figure.add_subplot(3, 1, place) for place in (1, 2, 3)]
    running = [sample["vllm:num_requests_running"] for sample in samples]
    waiting = [sample["vllm:num_requests_waiting"] for sample in samples]
    panels[0].stackplot(at, running, waiting, colors=(BLUE, ORANGE), labels=("running", "waiting"))
    tokens = rate(samples, "vllm:generation_tokens_total", "at")
    panels[1].plot(*tokens, color=BLUE, label="tokens a second")
    for name, color in (("time_to_first_token", ORANGE), ("inter_token_latency", GREY)):
        sums = f"vllm:{name}_seconds_sum", f"vllm:{name}_seconds_count"
        panels[2].plot(*rate(samples, *sums), color=color, label=f"{name}, mean seconds")
    panels[2].set_yscale("log")
    panels[2].set_xlabel(f"seconds; requests come faster, up to {FASTEST:g} a second")
    for panel in panels:
        panel.legend(frameon=False, loc="upper left")
        panel.set_xlim(0, SECONDS)
    figure.tight_layout()
    save(figure, "17-metrics")


def rate(
    samples: list[dict[str, float]], above: str, below: str, apart: int = 4
) -> tuple[list[float], list[float]]:
    """The growth of one number by that of another, between samples two seconds apart."""
    points = [
        (b["at"], (b[above] - a[above]) / (b[below] - a[below]))
        for a, b in zip(samples, samples[apart:], strict=False)
        if b[below] > a[below]
    ]
    return [at for at, _ in points], [value for _, value in points]


if __name__ == "__main__":
    main()
