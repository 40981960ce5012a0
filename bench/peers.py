"""ruvon beside other servers on this machine: same weights, same load generator, taking turns.

    python bench/peers.py [--model MODEL] [--files q4_1,q4_0,q8_0] [--peers ruvon,llama.cpp]
                          [--rounds 3] [--quick] [--slots 32]

Each peer is installed into an environment of its own under bench/.peers, and the weights are put
there in the formats of --files: q4_0, q4_1, q8_0, bf16, and int8, which is --quantization int8. A
peer that reads none of them gets bf16; what does not install or run is reported and left out. In
every round each server is started, measured and stopped, one after the other, so that a machine
that drifts drifts for all.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hardware import read_bandwidth
from measure import Target, machine, measure_server, write
from peer_servers import HOME, PEERS, Peer, Setting, install
from peer_tables import Column, render
from peer_weights import MADE, Weights
from process import Neighbours, Server, free_port, running

from ruvon.bench import find_model, open_session
from ruvon.errors import RuvonError
from ruvon.locate import find_embedded

BY_NAME = {peer.name: peer for peer in PEERS}
FAILURES = (RuntimeError, OSError, RuvonError, subprocess.CalledProcessError, ExceptionGroup)


def main() -> None:
    args = parse()
    weights = Weights(args.model or find_embedded())
    formats = args.files or weights.usual_formats()
    if unknown := set(formats) - {*MADE, weights.format}:
        raise SystemExit(
            f"--files: cannot make {', '.join(sorted(unknown))}; {', '.join(MADE)} can be"
        )
    columns = plan(args.peers, formats)
    for column in columns:
        attempt(column, lambda column=column: prepare(column, weights))
    for number in range(args.rounds):
        for column in columns:
            say(f"round {number + 1} of {args.rounds}: {column.name}")
            attempt(column, lambda column=column: one_round(column, weights, args))
    where = machine() | {"model": weights.source.name, "read_gb_s": round(read_bandwidth(), 1)}
    content = {"machine": where, "columns": [asdict(column) for column in columns]}
    print(render(where, columns))
    print(f"\nWrote {write('peers', content)}")


def parse() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    usual = [peer.name for peer in PEERS if peer.default]
    parser.add_argument("--model", type=Path, help="A GGUF file or a folder; default: embedded.")
    parser.add_argument("--files", type=names, help="Formats; default: the model's own and usual.")
    parser.add_argument("--peers", type=names, default=usual, help=f"Of {', '.join(BY_NAME)}.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="Leave out concurrency 16 and 32.")
    parser.add_argument(
        "--slots", type=int, default=32, help="Streams at once; loads of more are left out."
    )
    args = parser.parse_args()
    if unknown := set(args.peers) - BY_NAME.keys():
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(BY_NAME)}")
    if args.model and not args.model.exists():
        parser.error(f"--model: there is no {args.model}")
    return args


def plan(peers: list[str], formats: list[str]) -> list[Column]:
    """A column for each peer and format, those of one format beside each other."""
    pairs = [(name, format) for name in peers for format in BY_NAME[name].formats(formats)]
    order = {format: place for place, format in enumerate(formats)}
    pairs.sort(key=lambda pair: order.get(pair[1], len(order)))
    return [Column(name, format, BY_NAME[name].note) for name, format in pairs]


def attempt(column: Column, act: Callable[[], None]) -> None:
    """Do something for a column, unless it has failed before; a failure is noted, not raised."""
    if column.trouble:
        return
    try:
        act()
    except FAILURES as error:
        column.trouble = str(error).strip()[-1000:]
        say(f"{column.name} is left out: {column.trouble}")


def prepare(column: Column, weights: Weights) -> None:
    peer = BY_NAME[column.peer]
    install(peer)
    weights.path(peer, column.format)


def one_round(column: Column, weights: Weights, args: argparse.Namespace) -> None:
    peer, log = BY_NAME[column.peer], HOME / f"{column.name.replace(' ', '-')}.log"
    model = weights.path(peer, column.format)
    setting = Setting(model, column.format, weights.context, args.threads, free_port(), args.slots)
    command, neighbours = peer.command(peer.python, setting), Neighbours()
    with running(command, setting.port, peer.ready, peer.env(setting), log) as server:
        numbers = asyncio.run(run(peer, setting, server, args.quick))
    column.record(numbers | {"others_pct": 100 * neighbours.share()})
    column.instructions = peer.instructions(log.read_text(errors="replace"))


async def run(peer: Peer, setting: Setting, server: Server, quick: bool) -> Mapping[str, Any]:
    async with open_session() as session:
        served = str(setting.model) if peer.names_model else await find_model(session, server.url)
        target = Target(session, server.url, served, peer.backend, peer.ignore_eos)
        wanted = (4,) if quick else (4, 16, 32)
        concurrencies = tuple(number for number in wanted if number <= setting.slots)
        return await measure_server(server, target, concurrencies, setting.context, setting.slots)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
