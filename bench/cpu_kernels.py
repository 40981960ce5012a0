"""What each kernel of a CPU step costs, next to what the machine could do.

    python bench/cpu_kernels.py [--threads 2] [--cpu-isa avx2] [--model FILE] [--json FILE]
    python bench/cpu_kernels.py --model gpt2/config.json --load-format dummy --dtype bfloat16

For decodes of 1 to 32 sequences and for a prompt of 512 tokens: milliseconds a step spends in each
kind of instruction (all layers), the memory it reads and the multiply-adds it does. Ceilings are
measured first: bytes read a second, and what torch reaches in a plain int8 product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict

import numpy as np
import torch

from ruvon.config import EngineConfig
from ruvon.engine.resources import cores_to_pin
from ruvon.kernels.cpu import CpuKernels, Graph, allocate_cache
from ruvon.kernels.cpu.formats import FORMATS
from ruvon.kernels.cpu.graph import Instruction, sizes_of
from ruvon.kernels.cpu.params import Param
from ruvon.kernels.ops import ForwardBatch, PagedIndex, StepLimits
from ruvon.models import load_model
from ruvon.models.checkpoint import open_checkpoint
from ruvon.telemetry import silent

PAGE, CONTEXT, PROMPT = 16, 200, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-isa", help="Instead of the best that this CPU has.")
    parser.add_argument("--model", default=None)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto", help="of weights that are not quantized")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = EngineConfig(
        model=args.model,
        load_format=args.load_format,
        dtype=args.dtype,
        quantization=args.quantization,
    )
    dense = None if args.dtype == "auto" else getattr(torch, args.dtype)
    cores = cores_to_pin(args.threads, "auto")
    kernels = CpuKernels(args.threads, dense_dtype=dense, isa=args.cpu_isa, cores=cores)
    ceilings = measure_ceilings()
    print(f"{kernels.ops.name}, {args.threads} threads; torch ", end="")
    print(f"reads {ceilings['GB/s']:.1f} GB/s, ", end="")
    print(f"multiplies {ceilings['GOP/s']:.0f} GOP/s (int8)\n")
    graph = load_graph(kernels, config)
    results = {"ceilings": ceilings}
    for name, batch in batches().items():
        results[name] = report(name, graph, batch)
    kernels.close()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


def load_graph(kernels: CpuKernels, config: EngineConfig) -> Graph:
    model = load_model(open_checkpoint(config, silent), config, kernels.ops, silent)
    spec = model.spec
    cache = allocate_cache(
        spec.num_layers, 32 * 16, spec.num_kv_heads, PAGE, spec.head_dim, torch.float16
    )
    for layer in cache:
        for tensor in layer:
            tensor.normal_()  # memory that was never written to is one page of zeros
    return kernels.capture(model.forward, cache, StepLimits(PROMPT, 64, 64, 64))


def batches() -> dict[str, ForwardBatch]:
    decodes = {f"decode {n}": make_batch([(CONTEXT, 1)] * n) for n in (1, 2, 4, 8, 16, 32)}
    return {**decodes, f"prompt {PROMPT}": make_batch([(0, PROMPT)])}


def make_batch(chunks: list[tuple[int, int]]) -> ForwardBatch:
    """Sequences with so many tokens in the cache and so many new ones."""

    def ints(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    per_sequence = max(-(-(start + new) // PAGE) for start, new in chunks)
    tables = np.arange(len(chunks) * per_sequence).reshape(len(chunks), -1)
    places = [(s, start + i) for s, (start, new) in enumerate(chunks) for i in range(new)]
    slots = [int(tables[s, at // PAGE]) * PAGE + at % PAGE for s, at in places]
    starts = np.cumsum([0, *(new for _, new in chunks)])
    return ForwardBatch(
        token_ids=ints([(s * 7919 + at * 104729) % 40000 for s, at in places]),
        positions=ints([at for _, at in places]),
        paged=(PagedIndex(ints(slots), ints(tables.tolist())),),
        query_starts=ints(starts.tolist()),
        context_lens=ints([start + new for start, new in chunks]),
        logit_rows=ints((starts[1:] - 1).tolist()),
        max_query=max(new for _, new in chunks),
        max_context=max(start + new for start, new in chunks),
    )


def timed(work, seconds: float = 0.5) -> list[float]:
    work()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times


def measure_ceilings() -> dict[str, float]:
    """What torch reaches with memory, and with an int8 product that has no scales to apply."""
    memory = torch.ones(1 << 28, dtype=torch.float32)
    read = min(timed(memory.sum))
    codes = torch.ones(1024, 1024, dtype=torch.int8)
    product = min(timed(lambda: torch._int_mm(codes, codes)))
    return {"GB/s": memory.nbytes / read / 1e9, "GOP/s": 2 * 1024**3 / product / 1e9}


def kind_of_work(line: Instruction) -> str:
    name, told = line.kernel[0], line.arguments
    if name != "linear":
        return name
    tile = FORMATS[line.kernel[1]]
    gated = " x 2" if told.gate_bytes else ""
    return f"{tile.storage} {told.width}{gated} < {told.weight.steps * tile.step}"


def work_of(line: Instruction, tokens: int, rows: int) -> tuple[int, int]:
    """(bytes of weights read, multiply-adds counted twice) of a product."""
    if line.kernel[0] != "linear":
        return 0, 0
    told = line.arguments
    tiles = told.columns * 2 * (2 if told.gate_bytes else 1)
    height = tokens if told.counted == Param.TOKENS else rows
    k = told.weight.steps * FORMATS[line.kernel[1]].step
    return tiles * told.weight.tile_bytes, 2 * height * tiles * 16 * k


def report(name: str, graph: Graph, batch: ForwardBatch) -> dict[str, float]:
    step = timed(lambda: graph.replay(batch))
    program, tokens = graph.program, batch.token_ids.numel()
    sizes = sizes_of(batch.query_starts.numpy(), graph.num_rows)
    groups = defaultdict(list)
    for number, line in enumerate(program.instructions):
        groups[kind_of_work(line)].append(number)
    low, middle = 1e3 * min(step), 1e3 * statistics.median(step)
    print(f"{name}: {low:.2f} ms ({middle:.2f} median), {1e3 * tokens / low:.0f} tokens/s")
    result = {"step": low, "step, median": middle}
    for kind, numbers in groups.items():
        lines = program.pick(numbers)
        best = min(timed(lambda lines=lines: program.run(sizes, lines), 0.2))
        work = [work_of(program.instructions[n], tokens, graph.num_rows) for n in numbers]
        size, operations = (sum(column) for column in zip(*work, strict=True))
        rates = (
            f"{size / best / 1e9:8.1f} GB/s {operations / best / 1e9:6.0f} GOP/s" if size else ""
        )
        print(f"    {kind:20s} {len(numbers):4d} x {1e3 * best:8.3f} ms {rates}")
        result[kind] = 1e3 * best
    print(f"    {'sum':20s}        {sum(list(result.values())[2:]):8.3f} ms\n")
    return result


if __name__ == "__main__":
    main()
