"""ruvon and llama.cpp side by side, taking turns request by request: for machines that drift.

    python bench/turns.py [--minutes 5] [--files q4_1,q4_0] [--streams 16]

All servers run at once and wait their turn; only one has work at a time. Medians, with the number
of samples and the least and the most. Uses the environments and files of bench/peers.py.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

from measure import Target, decode_rate, first_token, throughput
from peer_servers import HOME, PEERS, Setting, install
from peer_weights import Weights
from process import free_port, running

from ruvon.bench import find_model, open_session
from ruvon.locate import find_embedded

Samples = dict[tuple[str, str], list[float]]


async def between_tokens(target: Target) -> float:
    return 1e3 / await decode_rate(target, repeats=1)


async def time_to_first(target: Target) -> float:
    return await first_token(target, repeats=1)


def output_of(streams: int) -> Callable[[Target], Awaitable[float]]:
    async def output(target: Target) -> float:
        return float((await throughput(target, streams, rounds=1))["output_throughput"])

    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--files", default="q4_1,q4_0", type=lambda text: text.split(","))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    weights, urls = Weights(find_embedded()), {}
    with ExitStack() as stack:
        for peer in (peer for peer in PEERS if peer.name in ("ruvon", "llama.cpp")):
            install(peer)
            for format in args.files:
                name, log = f"{peer.name} {format}", HOME / f"turns-{peer.name}-{format}.log"
                path, port = Path(weights.path(peer, format)), free_port()
                setting = Setting(path, format, weights.context, args.threads, port)
                command = peer.command(peer.python, setting)
                server = running(command, port, peer.ready, peer.env(setting), log)
                urls[name] = stack.enter_context(server).url
        samples = asyncio.run(take_turns(urls, args.minutes, args.streams))
    for (kind, name), values in sorted(samples.items()):
        spread = f"{min(values):.1f} to {max(values):.1f}, {len(values)} samples"
        print(f"{kind:32s} {name:16s} {statistics.median(values):9.1f}  ({spread})")


async def take_turns(urls: dict[str, str], minutes: float, streams: int) -> Samples:
    samples: Samples = defaultdict(list)
    kinds = {
        "between tokens, ms": between_tokens,
        "first token of 512, ms": time_to_first,
        f"output, {streams} streams, tok/s": output_of(streams),
    }
    async with open_session() as session:
        targets = {
            name: Target(session, url, await find_model(session, url)) for name, url in urls.items()
        }
        for target in targets.values():
            await target.run(2, 32, 8, 2)  # warm-up
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            for kind, measure in kinds.items():
                for name, target in targets.items():
                    samples[kind, name].append(await measure(target))
    return samples


if __name__ == "__main__":
    main()
