"""How many replicas a load needs, by playing it on a simulated fleet; and whether that is true.

    python bench/fleet.py plan --rate 20 --ttft 1.0 [--cost STEP,SEQUENCE,TOKEN,CONTEXT]
    python bench/fleet.py routes --rate 4       # ways to choose a replica, side by side
    python bench/fleet.py cost                  # of a replica with one core, as measured here
    python bench/fleet.py check [--rate 0.5]    # a small fleet, simulated and for real

Conversations are those of bench/conversations.py. ``plan`` finds the fewest replicas whose 99th
percentile of the time to the first token is at most ``--ttft`` seconds: real schedulers, caches and
the real router, on a clock of their own (bench/simulate.py).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from conversations import Conversation, mix
from measure import machine, write
from process import free_port, running
from simulate import COST, ROUTES, Cost, Simulation, percentile, tokens

from ruvon.bench import find_model, open_session
from ruvon.config import EngineConfig
from ruvon.engine.engine import Engine
from ruvon.engine.startup import start_engine
from ruvon.engine.types import Job, SamplingParams
from ruvon.telemetry import silent

CACHE = "256MiB"
WORDS = 40_000  # token ids of the embedded model that any text may have
SMALL = 0.12  # share of a conversation's lengths that one core can serve
REPLICAS = 2
TURNS = 3  # of a conversation, so that it is over soon
STEPS = ((1, 0), (4, 0), (16, 0), (0, 64), (0, 256), (0, 512), (8, 128))
"""Sequences that go on, and tokens of a prompt beside them, in a measured step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("plan", "routes", "cost", "check"))
    parser.add_argument("--rate", type=float, default=0.5, help="Conversations a second.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--ttft", type=float, default=1.0, help="Seconds, 99th percentile.")
    parser.add_argument("--blocks", type=int, default=8192, help="Of 16 tokens, of a replica.")
    parser.add_argument("--replicas", type=int, default=4, help="Of routes.")
    parser.add_argument("--cost", help="STEP,SEQUENCE,TOKEN,CONTEXT in seconds.")
    args = parser.parse_args()
    if args.what in ("plan", "routes"):
        cost = Cost(*map(float, args.cost.split(","))) if args.cost else COST
        load = list(mix(args.rate, args.seconds))
        turns = sum(len(each.turns) for each in load)
        print(f"{len(load)} conversations, {turns} turns in {args.seconds:g} s\n")
        if args.what == "plan":
            plan(load, args.ttft, cost, args.blocks)
        else:
            routes(load, args.replicas, cost, args.blocks)
        return
    if args.cost:
        cost, num_blocks = Cost(*map(float, args.cost.split(","))), args.blocks
    else:
        cost, num_blocks = measure_cost()
        told = ",".join(f"{value:.3g}" for value in cost)
        print(f"cost of a step: --cost {told} --blocks {num_blocks}", flush=True)
    if args.what == "check":
        check(args.rate, args.seconds, cost, num_blocks)


def routes(load: Sequence[Conversation], replicas: int, cost: Cost, blocks: int) -> None:
    """What each way to choose finds, and how long people wait."""
    print("| | hits | promised | first token p50 s | p99 s |")
    print("|---|---:|---:|---:|---:|")
    for name, route in ROUTES.items():
        played = Simulation(load, route, replicas=replicas, cost=cost, num_blocks=blocks).run()
        middle, p99 = (percentile(played.first_tokens(), share) for share in (0.5, 0.99))
        told = f"{played.hits:.1%} | {played.promised:.1%} | {middle:.3f} | {p99:.3f}"
        print(f"| {name} | {told} |", flush=True)


def plan(load: Sequence[Conversation], wanted: float, cost: Cost, blocks: int) -> None:
    """Double until it is enough, then halve the distance."""
    print("| replicas | hits | first token p50 s | p99 s | simulated in |")
    print("|---:|---:|---:|---:|---:|")
    few, most, before = 0, 1, float("inf")
    while (p99 := tried(load, most, cost, blocks)) > wanted:
        if p99 > 0.99 * before:
            print(f"\nMore replicas do not help: some prompts take {p99:.2f} s by themselves")
            return
        few, most, before = most, 2 * most, p99
    while most - few > max(1, most // 16):
        middle = (few + most) // 2
        enough = tried(load, middle, cost, blocks) <= wanted
        few, most = (few, middle) if enough else (middle, most)
    print(f"\n{most} replica(s) keep the 99th percentile within {wanted:g} s")


def tried(load: Sequence[Conversation], replicas: int, cost: Cost, blocks: int) -> float:
    began = time.perf_counter()
    route = ROUTES["router"]
    played = Simulation(load, route, replicas=replicas, cost=cost, num_blocks=blocks).run()
    firsts = played.first_tokens()
    middle, p99 = percentile(firsts, 0.5), percentile(firsts, 0.99)
    took = time.perf_counter() - began
    print(
        f"| {replicas} | {played.hits:.1%} | {middle:.3f} | {p99:.3f} | {took:.0f} s |", flush=True
    )
    return p99


def measure_cost() -> tuple[Cost, int]:
    """Fit a step's cost to steps of the embedded model on one core; and its cache's blocks."""
    config = EngineConfig(threads=1, kv_cache_memory=CACHE, enable_prefix_caching=False)
    loaded = start_engine(config, silent)
    rows, seconds = [], []
    try:
        for sequences, prompt in STEPS:
            rows_here, seconds_here = timed(loaded.engine, sequences, prompt)
            rows += rows_here
            seconds += seconds_here
    finally:
        loaded.close()
    weight = 1 / np.array(seconds)  # relative errors count alike
    fitted, *_ = np.linalg.lstsq(np.array(rows) * weight[:, None], np.ones(len(rows)), rcond=None)
    return Cost(*(max(float(value), 0.0) for value in fitted)), loaded.memory.num_blocks


def timed(engine: Engine, sequences: int, prompt: int) -> tuple[list[list[float]], list[float]]:
    """Some steps of one kind: what is in them, and what they took."""
    going = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    ids = [
        i
        for n in range(sequences)
        for i in engine.add(Job(tuple(words(n, 40)), going), 0.0)
    ]  # fmt: skip
    rows, seconds = [], []
    for number in range(14):
        if prompt and number > 3:
            once = SamplingParams(max_tokens=1, temperature=0.0)
            engine.add(Job(tuple(words(1000 + number, prompt)), once), 0.0)
        began = time.perf_counter()
        pending = engine.launch(0.0)
        if pending is None:
            continue
        engine.collect(pending)
        if number > 4:
            seconds.append(time.perf_counter() - began)
            rows.append(row_of(pending.plan.chunks))
    engine.abort(ids)
    return rows, seconds


def row_of(chunks: Sequence[Any]) -> list[float]:
    """What `Cost.of` multiplies."""
    sizes = [len(chunk.tokens) for chunk in chunks]
    looked = [len(c.tokens) * (c.start + len(c.tokens) / 2) for c in chunks]
    return [1.0, float(sizes.count(1)), float(sum(s for s in sizes if s > 1)), float(sum(looked))]


def words(seed: int, size: int) -> list[int]:
    return [8 + token % WORDS for token in tokens(seed, size)]


def check(rate: float, seconds: float, cost: Cost, num_blocks: int) -> None:
    """Two replicas of one core each: what was foretold, and what came."""
    load = [
        each._replace(turns=each.turns[:TURNS]) for each in mix(rate, seconds, scale=SMALL)
    ]  # fmt: skip
    config = EngineConfig()  # as the servers have it
    route = ROUTES["router"]
    foretold = Simulation(
        load, route, replicas=REPLICAS, cost=cost, num_blocks=num_blocks, config=config
    ).run()
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "ruvon",
        "serve",
        "--data-parallel-size",
        str(REPLICAS),
        "--port",
    ]
    options = ["--kv-cache-memory", CACHE, "--log-level", "warning", "--no-log-requests"]
    print(f"{len(load)} conversations, {len(foretold.finished)} turns", flush=True)
    with running([*command, str(port), *options], port) as server:
        firsts, hits = asyncio.run(play(server.url, load))
    numbers = {
        "simulated": summary(foretold.first_tokens(), foretold.hits),
        "measured": summary(sorted(firsts), hits),
    }
    for name, row in numbers.items():
        print(name, ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    print(f"\nWrote {write('fleet', {'machine': machine(), 'cost': cost, 'numbers': numbers})}")


def summary(firsts: Sequence[float], hits: float) -> dict[str, float]:
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    told = {name: percentile(firsts, share) for name, share in shares.items()}
    return {"turns": float(len(firsts)), "mean": sum(firsts) / len(firsts), **told, "hits": hits}


async def play(url: str, load: Sequence[Conversation]) -> tuple[list[float], float]:
    """The conversations for real: seconds to each first token, and the share that was cached."""
    firsts: list[float] = []
    counts = np.zeros(2)
    async with open_session() as session, asyncio.TaskGroup() as group:
        model = await find_model(session, url)
        while await num_ready(session, url) < REPLICAS:  # noqa: ASYNC110 - seldom
            await asyncio.sleep(0.2)

        async def converse(number: int, conversation: Conversation) -> None:
            await asyncio.sleep(conversation.start)
            text = words(conversation.shared, conversation.shared_tokens)
            for turn_number, turn in enumerate(conversation.turns):
                if turn_number:
                    await asyncio.sleep(turn.wait)
                text += words(1_000_000 + 1000 * number + turn_number, turn.asked)
                body = {
                    "model": model, "prompt": text, "max_tokens": turn.answered, "stream": True,
                    "ignore_eos": True, "temperature": 0, "return_token_ids": True,
                    "stream_options": {"include_usage": True},
                }  # fmt: skip
                text += await ask(session, url, body, firsts, counts)

        for number, conversation in enumerate(load):
            group.create_task(converse(number, conversation))
    return firsts, float(counts[1] / counts[0])


async def num_ready(session: Any, url: str) -> int:
    async with session.get(f"{url}/ready") as response:
        return int((await response.json())["ready"])


async def ask(
    session: Any, url: str, body: dict[str, Any], firsts: list[float], counts: Any
) -> list[int]:
    """One turn: the answer's ids."""
    began, answer = time.perf_counter(), []
    async with session.post(f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = orjson.loads(line[6:])
            for choice in event["choices"]:
                if not answer:
                    firsts.append(time.perf_counter() - began)
                answer += choice.get("token_ids") or []
            if usage := event.get("usage"):
                cached = usage["prompt_tokens_details"]["cached_tokens"]
                counts += (usage["prompt_tokens"], cached)
    return answer


if __name__ == "__main__":
    main()
