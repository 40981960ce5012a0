"""What chaos is made of: servers, what they are asked and what is done to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeAlias

import aiohttp
from disturbances import (
    Disturbance,
    World,
    break_log,
    drain,
    insist,
    kill,
    kill_rank,
    lose,
    stop_for_a_while,
    stuff_log,
    use_up_files,
)
from drawn import Case, catalogue
from fakes import TINY_LLAMA
from ports import free_port
from supervisor import Supervised, python

PROGRAM = Path(__file__).parent / "program.py"
FLAGS = (
    "--max-num-seqs", "32", "--max-num-batched-tokens", "256", "--max-num-queued-reqs", "256",
    "--watchdog-timeout", "60", "--log-format", "json",
)  # fmt: skip

Make: TypeAlias = Callable[[Path, str, aiohttp.ClientSession], World]


@dataclass(frozen=True)
class Scenario:
    """``share`` is of the time that all have."""

    what: str
    make: Make
    cases: Callable[[str, int], list[Case]]
    disturbances: Sequence[Disturbance]
    share: float
    clients: int = 200


def chaotic(folder: Path, seed: str, session: aiohttp.ClientSession) -> Supervised:
    """A server of a fake model that fails at random."""
    folder.mkdir()
    port = free_port()
    return Supervised(python(PROGRAM, folder, seed, "--port", port, *FLAGS), port, session)


def one_server(folder: Path, seed: str, session: aiohttp.ClientSession) -> World:
    server = chaotic(folder / "server", seed, session)
    return World(folder, server, [server])


def fleet(folder: Path, seed: str, session: aiohttp.ClientSession) -> World:
    """A router, and replicas that somebody else starts."""
    replicas = [chaotic(folder / name, f"{seed} {name}", session) for name in ("a", "b")]
    port, urls = free_port(), [replica.url for replica in replicas]
    command = python("-m", "ruvon", "route", *urls, "--port", port)
    command += ["--poll-interval", "0.5", "--log-format", "json"]
    return World(folder, Supervised(command, port, session), replicas)


def ranks(folder: Path, seed: str, session: aiohttp.ClientSession) -> World:
    """Two processes that compute a model together."""
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    server = real(
        session, str(folder), "--load-format", "dummy", "--kv-cache-memory", "1MiB",
        "--tensor-parallel-size", "2", "--pin-threads", "off",
    )  # fmt: skip
    return World(folder, server, [server])


def embedded(folder: Path, seed: str, session: aiohttp.ClientSession) -> World:
    """The embedded model, as users start it, with a cache that is too small for all."""
    server = real(session, "--deterministic", "--kv-cache-memory", "64MiB")
    return World(folder, server, [server])


def real(session: aiohttp.ClientSession, *options: str) -> Supervised:
    port = free_port()
    command = python("-m", "ruvon", "serve", *options, "--port", port, "--log-format", "json")
    return Supervised(command, port, session)


def ids_alone(seed: str, size: int) -> list[Case]:
    """Completions of ids, for models without a tokenizer."""
    rng, cases = Random(f"{seed} ids"), []
    for _ in range(size):
        stream = rng.random() < 0.5
        body = {
            "prompt": [rng.randrange(8, 320) for _ in range(rng.choice([1, 17, 60]))],
            "max_tokens": rng.choice([1, 8, 30]),
            "n": rng.choice([1, 1, 2]),
            "temperature": rng.choice([0, 1.0]),
            "seed": rng.randrange(1000),
            "logprobs": rng.choice([None, 2]),
            "return_token_ids": True,
            "ignore_eos": rng.random() < 0.5,
            "stream": stream,
        }
        cases.append(Case("valid", "/v1/completions", json.dumps(body).encode(), stream))
    return cases


def short(seed: str, size: int) -> list[Case]:
    """Requests of all kinds whose answers are soon over: a real model is slower."""
    limits = {
        "max_tokens": 8,
        "max_output_tokens": 16,
        "options": {"num_predict": 8, "temperature": 0},
    }
    cases = []
    for case in catalogue(seed, size):
        if case.kind == "valid":  # others may be no JSON, or deeper than a parser's stack
            body = json.loads(case.body)
            body |= {name: value for name, value in limits.items() if name in body}
            case = Case(case.kind, case.path, json.dumps(body).encode(), case.stream)
        cases.append(case)
    return cases


SCENARIOS: Mapping[str, Scenario] = {
    "server": Scenario(
        "one server whose steps fail at random",
        one_server,
        catalogue,
        (drain, kill, insist, lose, stop_for_a_while, stuff_log, break_log, use_up_files),
        0.4,
    ),
    "fleet": Scenario(
        "a router over two such servers",
        fleet,
        catalogue,
        (drain, kill, lose, stop_for_a_while),
        0.25,
    ),
    "ranks": Scenario(
        "a model on two ranks", ranks, ids_alone, (kill_rank, drain, stop_for_a_while), 0.15
    ),
    "model": Scenario("the embedded model, nothing injected", embedded, short, (), 0.2),
}
