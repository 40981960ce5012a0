"""A layer of experts by itself: what the operation and each of its instructions take.

    python bench/cpu_experts.py [--threads 2] [--isa NAME] [--format mxfp4] [--experts 32]
                                [--top-k 4] [--shape 2880x2880] [--tokens 1 4 16 128 512]

The shape is hidden size x an expert's width; by default gpt-oss's. Two layers take turns, so that
weights come from memory. For each number of tokens: milliseconds of a layer, operations (a
multiply-add is two) in thousands of millions a second, gigabytes a second of the weights of experts
that were reached, and microseconds of each instruction.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from cpu_products import FORMATS
from torch import Tensor

from ruvon.engine.resources import cores_to_pin
from ruvon.kernels.cpu import CpuKernels
from ruvon.kernels.cpu.graph import sizes_of
from ruvon.kernels.ops import Dense, Experts, ExpertsSpec, ForwardBatch, PackedExperts, StepLimits

SECONDS = 2.0
LAYERS = 2


def main() -> None:
    args = parse()
    hidden, width = map(int, args.shape.split("x"))
    spec = ExpertsSpec(args.experts, args.top_k, width, "swiglu_clamped")
    kernels = CpuKernels(args.threads, isa=args.isa, cores=cores_to_pin(args.threads, "auto"))
    layers = [make_layer(kernels, spec, hidden, args.format) for _ in range(LAYERS)]
    router = kernels.ops.pack(Dense(torch.randn(args.experts, hidden)))
    for tokens in args.tokens:
        report(kernels, layers, router, tokens, hidden)
    kernels.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa")
    parser.add_argument("--format", choices=FORMATS, default="mxfp4")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--shape", default="2880x2880")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 128, 512])
    return parser.parse_args()


def make_layer(kernels: CpuKernels, spec: ExpertsSpec, hidden: int, format: str) -> PackedExperts:
    make, n = FORMATS[format], spec.num_experts
    up, down = make(n * 2 * spec.width, hidden), make(n * hidden, spec.width)
    biases = torch.randn(n * 2 * spec.width), torch.randn(n * hidden)
    weights = Experts(up, biases[0], down, biases[1])
    began = time.perf_counter()
    packed = kernels.ops.pack_experts(weights, spec)
    size = sum(tensor.nbytes for tensor in packed.tensors[:2])
    print(f"packed {size / 1e6:.0f} MB in {time.perf_counter() - began:.2f} s")
    return packed


def report(kernels, layers, router, tokens: int, hidden: int) -> None:
    x = torch.randn(tokens, hidden)

    def forward(batch: ForwardBatch, cache: object) -> Tensor:
        outs = [kernels.ops.experts(x, router, None, layer) for layer in layers]
        return kernels.ops.add(*outs)

    graph = kernels.capture(forward, [], StepLimits(tokens, 1, tokens, 1), draws=False)
    sizes = sizes_of(np.array([0, tokens], np.int32), tokens)
    whole = best_of(lambda: graph.program.run(sizes)) / LAYERS
    parts: dict[str, float] = {}
    for n, line in enumerate(graph.program.instructions):
        alone = graph.program.pick([n])
        seconds = best_of(lambda lines=alone: graph.program.run(sizes, lines), 0.2)
        parts[line.kernel[0]] = parts.get(line.kernel[0], 0.0) + 1e6 * seconds / LAYERS
    spec, weights = layers[0].spec, sum(tensor.nbytes for tensor in layers[0].tensors[:2])
    reached = spec.num_experts * (1 - (1 - spec.top_k / spec.num_experts) ** tokens)  # of the even
    rate = weights * reached / spec.num_experts / whole / 1e9
    operations = 2 * 3 * hidden * spec.width * tokens * spec.top_k / whole / 1e9
    told = ", ".join(f"{name} {each:.0f}" for name, each in parts.items())
    print(f"{tokens:4} tokens: {1e3 * whole:8.2f} ms {operations:6.0f} {rate:6.1f}  ({told})")


def best_of(work, seconds: float = SECONDS) -> float:
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
