"""Products with bfloat16 weights, one by one: the CPU's dot product, float32, and torch's.

    python bench/cpu_products.py [--threads 2] [--shapes 768x2304 3072x768] [--rows 1 16 512]

A shape is inputs x outputs. So many weights of a shape are multiplied in turn that they come from
memory, as they do in a step. Times are the best of a product in milliseconds, the three taking
turns; activations are packed before, and torch gets its own in bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ruvon.kernels.cpu import CpuKernels, Limits
from ruvon.kernels.cpu.compiled import has_bf16
from ruvon.kernels.cpu.tape import sizes_of
from ruvon.kernels.ops import Dense, ForwardBatch

WEIGHT_BYTES = 1 << 26  # of all weights of a shape: more than caches hold
SHAPES = ("768x2304", "768x768", "768x3072", "3072x768")  # GPT-2's
SECONDS = 4  # that the three take turns, at least
Work = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 16, 512))
    args = parser.parse_args()
    if not has_bf16():
        raise SystemExit("this CPU has no dot product of bfloat16")
    torch.set_num_threads(args.threads)
    print("| inputs x outputs | rows | float32, ms | bfloat16, ms | torch, ms |")
    print("|---|---:|---:|---:|---:|")
    kernels = [CpuKernels(args.threads, bf16=bf16) for bf16 in (False, True)]
    for shape in args.shapes:
        k, n = map(int, shape.split("x"))
        weights = [torch.randn(n, k).bfloat16() for _ in range(WEIGHT_BYTES // (2 * n * k))]
        for rows in args.rows:
            works = [*(ours(each, weights, rows) for each in kernels), theirs(weights, rows)]
            cells = (f"{1e3 * best / len(weights):.3f}" for best in take_turns(works))
            print(f"| {shape} | {rows} | {' | '.join(cells)} |", flush=True)
    for each in kernels:
        each.close()


def ours(kernels: CpuKernels, weights: list[Tensor], rows: int) -> Work:
    packed = [kernels.ops.pack(Dense(weight)) for weight in weights]
    x = torch.randn(rows, weights[0].shape[1])

    def forward(batch: ForwardBatch, cache: object) -> Tensor:
        outs = [kernels.ops.linear(x, weight, None, "none") for weight in packed]
        return functools.reduce(kernels.ops.add, outs)  # somebody has to read them

    tape = kernels.record(forward, [], Limits(rows, 1, rows, 1))
    sizes = sizes_of(np.array([0, rows], np.int32), rows)
    tape.program.run(sizes)  # packs x
    instructions = enumerate(tape.program.instructions)
    lines = tape.program.pick([n for n, line in instructions if line.kernel[0] == "linear"])
    return lambda: tape.program.run(sizes, lines)


def theirs(weights: list[Tensor], rows: int) -> Work:
    x = torch.randn(rows, weights[0].shape[1]).bfloat16()
    return lambda: [torch.nn.functional.linear(x, weight) for weight in weights]


def take_turns(works: list[Work]) -> list[float]:
    """The best seconds of each."""
    times: list[list[float]] = [[] for _ in works]
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[0]) < 5:
        for work, taken in zip(works, times, strict=True):
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
    return [min(taken) for taken in times]


if __name__ == "__main__":
    main()
