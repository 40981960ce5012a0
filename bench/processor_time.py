"""ruvon and llama.cpp by processor time: for a machine that others keep busy.

    python bench/processor_time.py MODEL.gguf [--prompt 448] [--tokens 24] [--turns 3]

One thread each, one after the other, no HTTP. Prints the seconds of a prompt and milliseconds of
each token after it, least to most of the turns. Other programs change processor time much less than
what a clock says, but not nothing: caches and memory are shared.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from peer_servers import HERE, PEERS, install

from ruvon import LLM, SamplingParams

SHORT = 8  # tokens of the prompt before those that are timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", type=int, default=448)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    show("ruvon", ours(args))
    show("llama.cpp", theirs(args))


def ours(args: argparse.Namespace) -> list[tuple[float, float]]:
    rng = random.Random(0)
    with LLM(str(args.model), threads=1, device="cpu", max_model_len=1024) as llm:

        def seconds(prompt: int, tokens: int) -> float:
            ids = [rng.randrange(1000, 40000) for _ in range(prompt)]
            sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            began = time.process_time()
            llm.generate([ids], sampling, use_tqdm=False)
            return time.process_time() - began

        seconds(SHORT, 2)
        return [
            (
                seconds(args.prompt, 1),
                (seconds(SHORT, args.tokens + 1) - seconds(SHORT, 1)) / args.tokens,
            )
            for _ in range(args.turns)
        ]


def theirs(args: argparse.Namespace) -> list[tuple[float, float]]:
    (peer,) = (peer for peer in PEERS if peer.name == "llama.cpp")
    install(peer)
    numbers = map(str, (args.prompt, args.tokens, args.turns))
    command = [str(peer.python), str(HERE / "llamacpp_time.py"), str(args.model), *numbers]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [(float(a), float(b)) for a, b in map(str.split, told.splitlines())]


def show(name: str, turns: Sequence[tuple[float, float]]) -> None:
    prompts, tokens = ([turn[which] for turn in turns] for which in (0, 1))
    print(
        f"{name}: prompt {min(prompts):.2f} to {max(prompts):.2f} s, "
        f"token {1e3 * min(tokens):.1f} to {1e3 * max(tokens):.1f} ms"
    )


if __name__ == "__main__":
    main()
