"""What Ray Serve's own ingress adds and carries, to compare with bench/router.py.

    python bench/ray_serve.py [--streams 400] [--rate 100] [--tokens 256] [--seconds 8]
    RAY_SERVE_ENABLE_HA_PROXY=1 python bench/ray_serve.py    # its HAProxy in place of its own proxy

Its replicas are scripted too: an ASGI application that answers at once and then sends an event to
every stream each ``1 / rate`` seconds. The clients are those of bench/router.py. What is told of
processor time is that of all of Ray's processes together. Needs ``pip install 'ray[serve]'``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from pathlib import Path
from typing import Any

import ray
import uvloop
from measure import machine, write
from process import free_port
from ray import serve
from router import EVENT, first_tokens, percentile, streamed

TICKS = os.sysconf("SC_CLK_TCK")
REQUESTS = 400
SETTLE = 8.0  # seconds; its HAProxy is started anew a few times, which breaks connections


class Steps:
    """An application whose streams all wait for the same steps."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.step: asyncio.Future[None] | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        at = loop.time()
        while True:
            at = max(at + 1 / self.rate, loop.time())
            await asyncio.sleep(at - loop.time())
            assert self.step is not None
            self.step.set_result(None)
            self.step = loop.create_future()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if self.step is None:
            self.step = asyncio.get_running_loop().create_future()
            self.task = asyncio.create_task(self.run())
        while (await receive()).get("more_body"):
            pass
        tokens = int(dict(scope["headers"]).get(b"x-tokens", b"1"))
        kind = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        for number in range(tokens):
            if number:
                await asyncio.shield(self.step)
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def deploy(args: argparse.Namespace, port: int) -> None:
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment = serve.deployment(
        num_replicas=args.replicas, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0.1}
    )
    rate = args.rate
    serve.run(deployment(serve.ingress(lambda: Steps(rate))(type("Model", (), {}))).bind())


def of_ray() -> float:
    """Seconds of processor time of all descendants of this process."""
    parents, times = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        times[int(folder.name)] = (int(fields[11]) + int(fields[12])) / TICKS
    found, new = set(), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return sum(times[pid] for pid in found)


async def measure(port: int, args: argparse.Namespace) -> dict[str, float]:
    loop = asyncio.get_running_loop()

    def through(make: Any) -> Any:
        return loop.create_connection(make, "127.0.0.1", port)

    routed = await first_tokens(through, REQUESTS)
    began, before = time.monotonic(), of_ray()
    told = await streamed(through, {"clients": os.getpid()}, args)
    return {
        "first_token_p50_ms": 1e3 * statistics.median(routed),
        "first_token_p99_ms": 1e3 * percentile(routed, 99),
        **told,
        "ray_cores": (of_ray() - before) / (time.monotonic() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=400)
    parser.add_argument("--rate", type=float, default=100.0, help="Tokens per second of a stream.")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--tokens", type=int, default=256, help="Of an answer.")
    parser.add_argument("--replicas", type=int, default=2)
    args = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=4)
    port = free_port()
    deploy(args, port)
    time.sleep(SETTLE)
    numbers = uvloop.run(measure(port, args))
    for name, value in numbers.items():
        print(f"{name:>28}  {value:12,.3f}")
    print(f"\nWrote {write('ray_serve', {'machine': machine(), 'numbers': numbers})}")


if __name__ == "__main__":
    main()
