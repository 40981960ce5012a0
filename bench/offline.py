"""Measure the engine by itself, without HTTP, at several numbers of prompts.

python bench/offline.py [--model MODEL] [--batches 1,4,16,32]
"""

from __future__ import annotations

import argparse
import random
import time

from measure import machine, write

from ruvon import LLM, SamplingParams
from ruvon.bench import random_prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Default: the embedded one.")
    parser.add_argument("--batches", default="1,4,16,32")
    args = parser.parse_args()
    llm = LLM(args.model)
    rng = random.Random(time.time_ns())
    generate(llm, rng, 2, 16)
    numbers = {}
    print("| prompts at once | output tok/s | all tok/s |")
    print("|----------------:|-------------:|----------:|")
    for batch in map(int, args.batches.split(",")):
        seconds = generate(llm, rng, batch, 128)
        numbers[batch] = {"output_tok_s": batch * 128 / seconds, "tok_s": batch * 256 / seconds}
        row = numbers[batch]
        print(f"| {batch:>15} | {row['output_tok_s']:>12.0f} | {row['tok_s']:>9.0f} |")
    print(f"\nWrote {write('offline', {'machine': machine(), 'numbers': numbers})}")


def generate(llm: LLM, rng: random.Random, batch: int, num_output: int) -> float:
    """Seconds for a batch of new prompts of 128 tokens."""
    prompts = [random_prompt(rng, 128) for _ in range(batch)]
    sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
    started = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
