"""ruvon and llama.cpp by processor time: for a machine that others keep busy.

    python bench/processor_time.py MODEL.gguf [--prompt 448] [--tokens 24] [--turns 3]
                                   [--streams 16 32] [--theirs OTHER.gguf]
                                   [--dtype bfloat16] [--quantization int8] [--transformers]

MODEL may be a folder, where ``--theirs`` names a file. One thread each, one after the other, no
HTTP. Prints the seconds of a prompt, the milliseconds of each token after it and of a step of so
many streams, least to most of the turns. Other programs change processor time much less than what
a clock says, but not nothing: caches and memory are shared.
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
    parser.add_argument("--streams", type=int, nargs="+", default=[], help="Numbers of streams.")
    parser.add_argument("--theirs", type=Path, help="llama.cpp's file; default: the same.")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--transformers", action="store_true", help="Of a folder, too.")
    args = parser.parse_args()
    show("ruvon", args.streams, ours(args))
    show("llama.cpp", args.streams, theirs(args))
    if args.transformers:
        show("transformers", [], transformers(args))


def ours(args: argparse.Namespace) -> list[list[float]]:
    rng = random.Random(0)
    settings = {"dtype": args.dtype, "quantization": args.quantization, "max_model_len": 1024}
    with LLM(str(args.model), threads=1, device="cpu", **settings) as llm:

        def seconds(prompt: int, tokens: int, streams: int = 1) -> float:
            ids = [[rng.randrange(1000, 40000) for _ in range(prompt)] for _ in range(streams)]
            sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            began = time.process_time()
            llm.generate(ids, sampling, use_tqdm=False)
            return time.process_time() - began

        def step(streams: int) -> float:
            more = seconds(SHORT, args.tokens + 1, streams)
            return (more - seconds(SHORT, 1, streams)) / args.tokens

        seconds(SHORT, 2)
        return [
            [seconds(args.prompt, 1), *map(step, [1, *args.streams])] for _ in range(args.turns)
        ]


def theirs(args: argparse.Namespace) -> list[list[float]]:
    (peer,) = (peer for peer in PEERS if peer.name == "llama.cpp")
    install(peer)
    numbers = map(str, (args.prompt, args.tokens, args.turns, *args.streams))
    path = str(args.theirs or args.model)
    command = [str(peer.python), str(HERE / "llamacpp_time.py"), path, *numbers]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [[*map(float, line.split())] for line in told.splitlines()]


def transformers(args: argparse.Namespace) -> list[list[float]]:
    """Its own `generate`, greedy, in this environment."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    dtype = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)

    def seconds(prompt: int, tokens: int) -> float:
        ids = torch.randint(1000, 40000, (1, prompt))
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        began = time.process_time()
        model.generate(ids, do_sample=False, pad_token_id=0, **lengths)
        return time.process_time() - began

    seconds(SHORT, 2)
    return [
        [
            seconds(args.prompt, 1),
            (seconds(SHORT, args.tokens + 1) - seconds(SHORT, 1)) / args.tokens,
        ]
        for _ in range(args.turns)
    ]


def show(name: str, streams: Sequence[int], turns: Sequence[Sequence[float]]) -> None:
    prompts, *steps = zip(*turns, strict=True)
    parts = [f"prompt {min(prompts):.2f} to {max(prompts):.2f} s"]
    for count, seconds in zip([1, *streams], steps, strict=True):
        what = "token" if count == 1 else f"step of {count}"
        parts.append(f"{what} {1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f} ms")
    print(f"{name}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
