"""Sampling on the CPU: compiled kernels beside their meaning in numpy, taking turns.

python bench/sampling.py [--threads 2] [--vocab 49152] [--rows 32]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ruvon.engine.cpu_sampler import CpuSampler
from ruvon.engine.resources import cores_to_pin
from ruvon.engine.sampler import sample
from ruvon.engine.types import SamplingParams, SamplingRow
from ruvon.kernels.cpu import CpuKernels

SETTINGS = {
    "temperature": {"temperature": 0.8},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "penalties, 5 logprobs": {"frequency_penalty": 0.5, "repetition_penalty": 1.1, "logprobs": 5},
}
ROUNDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rows", type=int, default=32)
    args = parser.parse_args()
    kernels = CpuKernels(args.threads, cores=cores_to_pin(args.threads, "auto"))
    compiled = CpuSampler(
        kernels.sampler(args.vocab, args.rows), lambda: torch.zeros(args.rows, dtype=torch.int64)
    )
    generator = torch.Generator().manual_seed(0)
    logits_LV = 3 * torch.randn(args.rows, args.vocab, generator=generator)
    print(f"{args.rows} rows of {args.vocab} logits, {args.threads} threads; medians")
    for name, setting in SETTINGS.items():
        rows = [
            SamplingRow(n, SamplingParams(**setting), [n, 5, 7] * 60, 90, n)
            for n in range(args.rows)
        ]
        ours, numpys = [], []
        for _ in range(ROUNDS):
            ours.append(milliseconds(lambda rows=rows: compiled(logits_LV, rows, ())))
            numpys.append(milliseconds(lambda rows=rows: sample(logits_LV, rows, ())))
        fast, slow = statistics.median(ours), statistics.median(numpys)
        print(f"{name:24s} {fast:7.2f} ms  numpy {slow:7.2f} ms  {slow / fast:5.1f} x")
    kernels.close()


def milliseconds(work) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


if __name__ == "__main__":
    main()
