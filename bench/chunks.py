"""What a long prompt does to running answers, and they to it, by the budget of a step.

    python bench/chunks.py [--prompt 1500] [--streams 8]

The embedded model. Streams are running when the prompt arrives; the longest time between two tokens
of theirs while it is computed, and its own time to the first token. Tokens must be the same for
every budget. The last row is --no-enable-chunked-prefill.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import deque
from dataclasses import replace

from ruvon.config import EngineConfig
from ruvon.engine.engine import Engine
from ruvon.engine.startup import LoadedEngine, start_engine
from ruvon.engine.steps import Pending
from ruvon.engine.types import Job, SamplingParams
from ruvon.telemetry import silent

BUDGETS = (32, 64, 128, 256, 512, 2048)
WORDS = 40_000  # token ids of the embedded model that any text may have
BEFORE = 8  # steps of the streams alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompt", type=int, default=1500)
    parser.add_argument("--streams", type=int, default=8)
    args = parser.parse_args()
    config = EngineConfig(
        max_num_batched_tokens=BUDGETS[-1], max_num_seqs=32, enable_prefix_caching=False
    )
    loaded = start_engine(config, silent)
    run(loaded, config, args.prompt, args.streams)  # what is called first takes longer
    print("| tokens a step | longest gap ms | first token of the prompt ms | steps |")
    print("|---:|---:|---:|---:|")
    found = set()
    for budget in (*BUDGETS, 0):
        chunked = budget > 0
        settings = replace(
            config,
            max_num_batched_tokens=budget or BUDGETS[-1],
            enable_chunked_prefill=chunked,
            max_num_seqs=min(budget or 32, 32),
        )
        gap, first, steps, tokens = run(loaded, settings, args.prompt, args.streams)
        found.add(tokens)
        name = budget if chunked else "whole prompts"
        print(f"| {name} | {gap * 1e3:.0f} | {first * 1e3:.0f} | {steps} |")
    assert len(found) == 1, "tokens depend on the budget"
    loaded.close()


def run(
    loaded: LoadedEngine, config: EngineConfig, length: int, streams: int
) -> tuple[float, float, int, tuple[int, ...]]:
    """→ (longest gap, seconds to the prompt's first token, its steps, all tokens in order)."""
    engine = Engine(
        loaded.runner,
        config,
        max_model_len=loaded.memory.max_model_len,
        num_blocks=loaded.memory.num_blocks,
        vocab_size=loaded.checkpoint.spec.vocab_size,
    )
    rng = random.Random(0)
    sampling = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)

    def add(size: int) -> int:
        prompt = tuple(rng.choices(range(WORDS), k=size))
        return engine.add(Job(prompt, sampling), time.monotonic())[0]

    running = [add(16) for _ in range(streams)]
    moments: dict[int, list[float]] = {seq_id: [] for seq_id in running}
    tokens: dict[int, list[int]] = {}
    pending: deque[Pending] = deque()
    late, arrived, steps = -1, 0.0, 0
    while engine.has_work:
        while (step := engine.launch(time.monotonic())) is not None:
            pending.append(step)
        for emission in engine.collect(pending.popleft()):
            moments[emission.seq_id].append(time.monotonic())
            tokens.setdefault(emission.seq_id, []).extend(emission.tokens)
        steps += 1
        if steps == BEFORE:
            late, arrived, before = add(length), time.monotonic(), steps
            moments[late] = []
        if late >= 0 and moments[late]:
            engine.abort([*running, late])
    first = moments[late][0]
    gaps = [
        b - a
        for seq_id in running
        for a, b in zip(moments[seq_id], moments[seq_id][1:], strict=False)
        if b > arrived
    ]
    kept = [token for seq_id in (*running[:1], late) for token in tokens[seq_id][:BEFORE]]
    return max(gaps), first - arrived, steps - before, tuple(kept)


if __name__ == "__main__":
    main()
