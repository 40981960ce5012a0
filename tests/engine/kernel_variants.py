"""Which variants of Triton's kernels a GPU's runner asks for: nothing is compiled and nothing
computed, so no GPU is needed; but it must be a process of its own, without the interpreter.

Prints, as JSON, how many variants the start needs and what those are that serving adds.
"""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ruvon.config import EngineConfig
from ruvon.engine import batch
from ruvon.engine.backends import eager
from ruvon.engine.gpu.runner import GpuRunner
from ruvon.engine.kv_cache import plan_memory
from ruvon.engine.runners import make_runner
from ruvon.engine.types import Chunk, NewSequence, Plan, PromptRow, SamplingParams
from ruvon.engine.warm_up import warm_up
from ruvon.kernels.triton_ops import make_triton_ops
from ruvon.models import load_model
from ruvon.models.checkpoint import open_checkpoint
from ruvon.telemetry import silent

BLOCK, LONGEST, BUDGET = 16, 2048, 512


class Hopper:
    """What Triton asks about the device before it looks for a compiled kernel."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def listen() -> set[tuple[str, str]]:
    """A set that will hold the variants asked for."""
    asked: set[tuple[str, str]] = set()

    def note(self: JITFunction, key: str, *rest: object) -> None:
        asked.add((self.__name__, key))

    driver.set_active(Hopper())
    JITFunction._do_compile = note  # returns no kernel, so none is launched
    batch.to_device = lambda arrays, device: batch.part(  # as for a GPU, where addresses matter
        torch.from_numpy(batch.join(arrays)), [array.shape for array in arrays]
    )
    return asked


def start(folder: Path, sequences: int, deterministic: bool) -> GpuRunner:
    config = EngineConfig(
        str(folder), load_format="dummy", device="cpu", kv_cache_memory="64MiB", block_size=BLOCK,
        max_model_len=LONGEST, max_num_seqs=sequences, max_num_batched_tokens=BUDGET,
    )  # fmt: skip
    cpu = torch.device("cpu")
    ops = make_triton_ops(torch.bfloat16, cpu, pdl=True, batch_invariant=deterministic)
    model = load_model(open_checkpoint(config, silent), config, ops, silent)
    backend = replace(eager(ops), graphs=True)
    memory = plan_memory(model.spec, config, backend.kv, weight_bytes=0, free_bytes=0)
    grammars = SimpleNamespace(eos_token_ids=(2,), vocab_size=model.spec.vocab_size)
    runner = make_runner(model, config, memory, backend, grammars, silent)
    warm_up(runner, config)
    return runner


def score(runner: GpuRunner, prompts: list[tuple[int, int]], sampling: SamplingParams) -> None:
    """A step of prompts, each some tokens after so many others, with all their logprobs."""
    chunks, new, scored, free = [], [], [], iter(range(10**6))
    for i, (begin, length) in enumerate(prompts):
        tokens = (1,) * length
        blocks = (tuple(next(free) for _ in range(-(-(begin + length) // BLOCK))),)
        chunks.append(Chunk(i, 0, tokens, begin, blocks, True))
        new.append(NewSequence(i, sampling, begin + length, 0, (1,) * begin))
        scored.append(PromptRow(i, i, tokens[1:] or tokens, 1))
    runner.launch(Plan(0, tuple(chunks), tuple(new), (), tuple(scored))).result()


def serve(runner: GpuRunner, sequences: int) -> None:
    """Prompts of many lengths, alone and together."""
    rng = random.Random(0)
    greedy = SamplingParams(temperature=0)
    typical = SamplingParams(typical_p=0.5, bad_words=((3,), (4, 5)))
    for length in (*range(1, 68, 3), 2, 16, 17, 32, 33, 64, 65, 100, 128, 255, 300, BUDGET):
        score(runner, [(rng.choice((0, 1, 15, 16, 33, 700)), length)], greedy)
    for number in range(1, min(sequences, 6) + 1):
        together = [(rng.randrange(300), rng.randrange(1, 60)) for _ in range(number)]
        score(runner, together, typical)


def main() -> None:
    folder, sequences = Path(sys.argv[1]), int(sys.argv[2])
    asked = listen()
    runner = start(folder, sequences, "--deterministic" in sys.argv)
    at_start = set(asked)
    serve(runner, sequences)
    runner.close()
    print(json.dumps({"start": len(at_start), "more": sorted(asked - at_start)}))


if __name__ == "__main__":
    main()
