"""Servers side by side, taking turns request by request: for machines that drift.

    python bench/turns.py [--minutes 5] [--model FILE] [--files q4_1,q4_0] [--streams 16]
                          [--peers ruvon,llama.cpp] [--beside OTHER/CHECKOUT ...] [--apart]

All servers run at once and wait their turn; only one has work at a time. With ``--apart`` each is
started for its turn and ended behind it, for files that memory has room for once. Medians, with the
number of samples and the least and the most, and the ratio to ruvon's with the same file. Uses the
environments and files of bench/peers.py; other checkouts of ruvon run in this one's environment.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from aiohttp import ClientSession
from measure import Target, decode_rate, first_token, throughput
from peer_servers import HOME, PEERS, Peer, Setting, install
from peer_weights import Weights
from process import Server, environment, free_port, running

from ruvon.bench import find_model, open_session
from ruvon.locate import find_embedded

ROOT = Path(__file__).parent.parent
Samples = dict[tuple[str, str, str], list[float]]  # (what, server, file)


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
    parser.add_argument("--model", type=Path, help="A GGUF file or a folder; default: embedded.")
    parser.add_argument("--files", help="Formats; default: the model's own and q4_0.")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default="ruvon,llama.cpp")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="Other checkouts.")
    parser.add_argument("--apart", action="store_true", help="One server at a time.")
    args = parser.parse_args()
    peers = {peer.name: peer for peer in PEERS}
    chosen = [(name, peers[name], ROOT) for name in args.peers.split(",")]
    chosen += [(str(tree), peers["ruvon"], tree.resolve()) for tree in args.beside]
    weights = Weights(args.model or find_embedded())
    formats = args.files.split(",") if args.files else dict.fromkeys((weights.format, "q4_0"))
    entrants = {
        (name, format): Entrant(peer, tree, weights, format, args)
        for name, peer, tree in chosen
        for format in formats
        if peer.reads(format)
    }
    groups = [{key: each} for key, each in entrants.items()] if args.apart else [entrants]
    samples: Samples = defaultdict(list)
    minutes, end = 0 if args.apart else args.minutes, time.monotonic() + 60 * args.minutes
    while not samples or time.monotonic() < end:
        for group in groups:
            with ExitStack() as stack:
                ready = {key: stack.enter_context(each.running()) for key, each in group.items()}
                asyncio.run(take_turns(group, ready, samples, args.streams, minutes))
                for key, server in ready.items():
                    samples["ready, s", *key].append(server.ready_seconds)
                    samples["memory at most, MB", *key].append(server.peak_memory() / 1e6)
    print_samples(samples)


class Entrant:
    """A peer's server, not yet started; ruvon's is that of the checkout at ``tree``."""

    def __init__(
        self, peer: Peer, tree: Path, weights: Weights, format: str, args: argparse.Namespace
    ) -> None:
        install(peer)
        self._peer, self._tree = peer, tree
        path, port = Path(weights.path(peer, format)), free_port()
        self._setting = Setting(path, format, weights.context, args.threads, port, args.streams)

    def running(self) -> AbstractContextManager[Server]:
        """The server, which is ready."""
        peer, setting = self._peer, self._setting
        log = HOME / f"turns-{self._tree.name}-{peer.name}-{setting.format}.log"
        env = {**environment(self._tree), **peer.env(setting)}
        return running(peer.command(peer.python, setting), setting.port, peer.ready, env, log)

    async def target(self, session: ClientSession, url: str) -> Target:
        peer = self._peer
        name = str(self._setting.model) if peer.names_model else await find_model(session, url)
        return Target(session, url, name, peer.backend, peer.ignore_eos)


def print_samples(samples: Samples) -> None:
    medians = {key: statistics.median(values) for key, values in samples.items()}
    for key, values in sorted(samples.items()):
        kind, name, format = key
        own = medians.get((kind, "ruvon", format))
        ratio = f"{medians[key] / own:5.2f}" if own else ""
        spread = f"{min(values):.1f} to {max(values):.1f}, {len(values)} samples"
        print(f"{kind:28s} {format:6s} {name:16s} {medians[key]:9.1f} {ratio}  ({spread})")


async def take_turns(
    entrants: Mapping[tuple[str, str], Entrant],
    servers: Mapping[tuple[str, str], Server],
    samples: Samples,
    streams: int,
    minutes: float,
) -> None:
    """Add samples of each server for so long, but one of each at least."""
    kinds = {
        "between tokens, ms": between_tokens,
        "first token of 512, ms": time_to_first,
        f"output, {streams} streams, tok/s": output_of(streams),
    }
    async with open_session() as session:
        targets = {
            key: await entrants[key].target(session, server.url) for key, server in servers.items()
        }
        for target in targets.values():
            await target.run(2, 32, 8, 2)  # warm-up
        end = time.monotonic() + 60 * minutes
        while True:
            for kind, measure in kinds.items():
                for key, target in targets.items():
                    samples[kind, *key].append(await measure(target))
            if time.monotonic() >= end:
                return


if __name__ == "__main__":
    main()
