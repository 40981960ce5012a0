"""Products one by one: weights of each format, under each instruction set, beside torch's.

    python bench/cpu_products.py [--threads 2] [--isa avx2 portable] [--formats q4_1 q8_0 bf16]
                                 [--shapes 576x3072 1536x576] [--rows 1 4 16 128 512]

A shape is inputs x outputs. Of a shape so many weights are multiplied in turn that they come from
memory (``--resident``: one weight only, from the caches). Columns take turns; each shows the best
of its turns, operations (a multiply-add is two) in thousands of millions a second and, in brackets,
gigabytes of weights a second. Activations are packed before; torch gets its own, in the weight's
type, and quantized weights as float32.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ruvon.engine.resources import cores_to_pin
from ruvon.kernels.cpu import CpuKernels
from ruvon.kernels.cpu.graph import sizes_of
from ruvon.kernels.ops import Dense, ForwardBatch, Mxfp4, Quantized, StepLimits, Weight

WEIGHT_BYTES = 1 << 26  # of all weights of a shape: more than caches hold
SECONDS = 2  # that the columns take turns, at least
Work = Callable[[], object]


def codes(n: int, k: int, bits: int) -> Tensor:
    low, high = (-128, 128) if bits == 8 else (0, 1 << bits)
    return torch.randint(low, high, (n, k)).to(torch.int8)


def grid(bits: int, *, offsets: bool = False, zero: int = 0) -> Callable[[int, int], Weight]:
    """Weights with a float16 scale, and perhaps an offset, for each 32."""

    def make(n: int, k: int) -> Quantized:
        scales = (torch.rand(n, k // 32) * 0.01).half()
        return Quantized(codes(n, k, bits), scales, scales if offsets else None, 32, bits, zero)

    return make


def blocks(bits: int, group: int, *, offsets: bool, zero: int = 0) -> Callable[..., Weight]:
    """Weights with small integers for scales, as the K-quants have."""

    def make(n: int, k: int) -> Quantized:
        scales = torch.randint(0, 64, (n, k // group)).to(torch.int8)
        over = (torch.rand(n, k // 256, 2 if offsets else 1) * 1e-4).half()
        shift = scales if offsets else None
        return Quantized(codes(n, k, bits), scales, shift, group, bits, zero, over)

    return make


def floats(n: int, k: int) -> Mxfp4:
    bytes_of = torch.randint(0, 256, (n, k // 32, 16), dtype=torch.uint8)
    return Mxfp4(bytes_of, torch.full((n, k // 32), 120, dtype=torch.uint8))


def dense(dtype: torch.dtype) -> Callable[[int, int], Weight]:
    return lambda n, k: Dense(torch.randn(n, k).to(dtype))


FORMATS: dict[str, Callable[[int, int], Weight]] = {
    "q4_0": grid(4, zero=8),
    "q4_1": grid(4, offsets=True),
    "q5_0": grid(5, zero=16),
    "q8_0": grid(8),
    "q4_k": blocks(4, 32, offsets=True),
    "q5_k": blocks(5, 32, offsets=True),
    "q6_k": blocks(6, 16, offsets=False, zero=32),
    "mxfp4": floats,
    "f32": dense(torch.float32),
    "f16": dense(torch.float16),
    "bf16": dense(torch.bfloat16),
}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    kernels = [
        CpuKernels(args.threads, isa=name, cores=cores_to_pin(args.threads, "auto"))
        for name in args.isa or [None]
    ]
    names = [*(each.isa.name for each in kernels), "torch"]
    print(f"| format | inputs x outputs | rows | {' | '.join(names)} |")
    print(f"|---|---|---:|{'---:|' * len(names)}")
    for name in args.formats:
        for shape in args.shapes:
            k, n = map(int, shape.split("x"))
            weights = make_weights(FORMATS[name], n, k, args.resident)
            for rows in args.rows:
                works = [*(ours(each, weights, rows) for each in kernels), theirs(weights, rows)]
                cells = [
                    f"{2 * n * k * rows * len(weights) / best / 1e9:.0f} ({size / best / 1e9:.1f})"
                    for best, size in take_turns(works)
                ]
                print(f"| {name} | {shape} | {rows} | {' | '.join(cells)} |", flush=True)
    for each in kernels:
        each.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", nargs="+", help="Instruction sets; default: the best one here.")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["q4_1", "q8_0", "bf16"])
    parser.add_argument("--shapes", nargs="+", default=["768x3072", "1536x768"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 128, 512])
    parser.add_argument("--resident", action="store_true", help="Weights that caches hold.")
    return parser.parse_args()


def make_weights(
    make: Callable[[int, int], Weight], n: int, k: int, resident: bool
) -> list[Weight]:
    first = make(n, k)
    size = n * k * (2 if isinstance(first, Dense) else 1)
    count = 1 if resident else max(WEIGHT_BYTES // size, 1)
    return [first, *(make(n, k) for _ in range(count - 1))]


def ours(kernels: CpuKernels, weights: list[Weight], rows: int) -> tuple[Work, int]:
    """What to time, and the bytes of weights that it reads."""
    packed = [kernels.ops.pack(weight) for weight in weights]
    x = torch.randn(rows, packed[0].shape[1])

    def forward(batch: ForwardBatch, cache: object) -> Tensor:
        outs = [kernels.ops.linear(x, weight, None, "none") for weight in packed]
        return functools.reduce(kernels.ops.add, outs)  # somebody has to read them

    graph = kernels.capture(forward, [], StepLimits(rows, 1, rows, 1))
    sizes = sizes_of(np.array([0, rows], np.int32), rows)
    graph.program.run(sizes)  # packs x
    instructions = enumerate(graph.program.instructions)
    lines = graph.program.pick([n for n, line in instructions if line.kernel[0] == "linear"])
    size = sum(tensor.nbytes for weight in packed for tensor in weight.tensors)
    return (lambda: graph.program.run(sizes, lines)), size


def theirs(weights: list[Weight], rows: int) -> tuple[Work, int]:
    plain = [w.weight_NK if isinstance(w, Dense) else w.dequantize() for w in weights]
    x = torch.randn(rows, plain[0].shape[1]).to(plain[0].dtype)
    work = lambda: [torch.nn.functional.linear(x, weight) for weight in plain]  # noqa: E731
    return work, sum(weight.nbytes for weight in plain)


def take_turns(works: list[tuple[Work, int]]) -> list[tuple[float, int]]:
    """The best seconds of each, and its bytes."""
    times: list[list[float]] = [[] for _ in works]
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[0]) < 5:
        for (work, _), taken in zip(works, times, strict=True):
            began = time.perf_counter()
            work()
            taken.append(time.perf_counter() - began)
    return [(min(taken), size) for taken, (_, size) in zip(times, works, strict=True)]


if __name__ == "__main__":
    main()
