"""The embedded model on one rank, two ranks and two stages of this machine: tokens a second.

    python bench/ranks.py [--tokens 64] [--streams 1 16]

Each rank has a share of the cores, and they meet over gloo. Greedy; without the start.
"""

from __future__ import annotations

import argparse
import random
import time

from ruvon import LLM, SamplingParams

WAYS = {
    "one rank": {},
    "two ranks": {"tensor_parallel_size": 2},
    "two stages": {"pipeline_parallel_size": 2},
}
WORDS = 40_000  # token ids of the embedded model that any text may have


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    print("| | " + " | ".join(f"{n} stream(s), tokens/s" for n in args.streams) + " |")
    print("|---" * (len(args.streams) + 1) + "|")
    for name, settings in WAYS.items():
        with LLM(kv_cache_memory="256MiB", enable_prefix_caching=False, **settings) as llm:
            cells = [f"{rate(llm, n, args.tokens):.0f}" for n in args.streams]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def rate(llm: LLM, streams: int, num_tokens: int) -> float:
    """The better of two runs: who else wants the cores only ever makes it slower."""
    rng = random.Random(0)
    prompts = [rng.choices(range(WORDS), k=16) for _ in range(streams)]
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    best = 0.0
    for _ in range(2):
        began = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        best = max(best, streams * num_tokens / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    main()
