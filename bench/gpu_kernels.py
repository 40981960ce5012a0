"""Time each Triton kernel beside what the chip was measured to do in the same run.

    python bench/gpu_kernels.py [--models gpt2,xl,smollm2,gpt-oss]

Shapes are those of the models, bfloat16; of gpt-oss attention, the cache and experts: 64 query and
8 key heads, sinks, a window of 128 or none; 4 of 32 experts a token, in MXFP4, random ones. Each
kernel runs in a CUDA graph over several copies of
what it reads, so that L2 holds none of it. Bytes are the least that must move; the ceilings are a
copy (bytes read and written) and a product of 8192 by 8192.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from gpu import CONTEXT, DEVICE, PAGE, milliseconds
from measure import write
from torch import Tensor

from ruvon.engine.gpu.graphs import Bucket, StepWords
from ruvon.kernels.ops import (
    Activation,
    AttentionSpec,
    Experts,
    ExpertsSpec,
    ForwardBatch,
    Mxfp4,
    Packed,
    PagedIndex,
    Rope,
)
from ruvon.kernels.pdl import supports_pdl
from ruvon.kernels.reference import rms_norm, route
from ruvon.kernels.staging import load_inputs, store_outputs
from ruvon.kernels.triton_ops import make_triton_ops

BATCHES = (1, 8, 64, 256)
SPREAD = 200 << 20  # bytes over which a kernel's copies are spread: four times L2


class Shape(NamedTuple):
    hidden: int
    heads: int
    groups: int
    inner: int  # 0: experts
    activation: Activation
    vocab: int = 0
    rotated: bool = False
    windows: tuple[int, ...] = (0,)
    sinks: bool = False


SHAPES = {
    "gpt2": Shape(768, 12, 12, 3072, "gelu_tanh", 50257),
    "xl": Shape(1600, 25, 25, 6400, "gelu_tanh", 50257),
    "smollm2": Shape(576, 9, 3, 1536, "silu_gated", 49152, rotated=True),
    "gpt-oss": Shape(2880, 64, 8, 0, "none", rotated=True, windows=(0, 128), sinks=True),
}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def seconds(run: Callable[[int], object], copies: int) -> float:
    """Of one run, on each of ``copies`` in turn, captured."""
    for i in range(copies):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            run(i)
    return milliseconds(graph.replay, 5) / copies / 1e3


def spread(num_bytes: int) -> int:
    return min(max(2, SPREAD // num_bytes), 48)


@dataclass
class Report:
    """Rows as they are measured. Ceilings are in bytes and operations a second."""

    bandwidth: float
    peak: float
    rows: list[tuple[str, float, float, float]] = field(default_factory=list)

    def add(self, name: str, took: float, num_bytes: float, operations: float = 0.0) -> None:
        rate, work = num_bytes / took, operations / took
        share = max(rate / self.bandwidth, work / self.peak)
        print(
            f"| {name} | {took * 1e6:.1f} | {rate / 1e9:,.0f} | {work / 1e12:.1f} | {share:.0%} |"
        )
        self.rows.append((name, took, rate, work))


def measure_ceilings() -> Report:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    took = milliseconds(lambda: target.copy_(source), 5) / 1e3
    x, y = normal(8192, 8192), normal(8192, 8192)
    product = milliseconds(lambda: x @ y, 5) / 1e3
    report = Report(2 * source.nbytes / took, 2 * 8192**3 / product)
    print(f"copy {report.bandwidth / 1e9:,.0f} GB/s, product {report.peak / 1e12:.0f} TFLOP/s")
    print("| kernel | us | GB/s | TFLOP/s | share of the ceiling |\n|---|---:|---:|---:|---:|")
    return report


def measure_staging(report: Report) -> None:
    """The start of a step: its words out of the host's memory, and a new block for every sequence;
    and its end, the results into the host's memory."""
    pdl = supports_pdl(DEVICE)
    for tokens, sequences in ((1, 1), (256, 256), (8192, 256)):
        layout = StepWords(Bucket(tokens == sequences, tokens, sequences))
        inputs = layout.views(layout.blank)
        inputs["token_ids"][:sequences] = -1 - np.arange(sequences)
        inputs["patches"][:sequences, 0] = np.arange(sequences) * 128
        staged = torch.from_numpy(layout.blank).view(1, -1).pin_memory()
        zeros = partial(torch.zeros, dtype=torch.int32, device=DEVICE)
        turn, words, last_tokens = zeros(1), zeros(layout.size), zeros(sequences)
        tables = zeros(1, sequences, 128)

        load = partial(
            load_inputs, staged, turn, words, layout.views(words), last_tokens, tables, PAGE, pdl,
        )  # fmt: skip

        def run(i: int, load: Callable[[], None] = load) -> None:
            load()

        moved = 2 * words.nbytes + last_tokens.nbytes + 4 * sequences
        report.add(f"load inputs, {tokens} tokens of {sequences}", seconds(run, 48), moved)
    for sequences in (1, 256):
        results = torch.zeros(3, sequences, dtype=torch.int32, device=DEVICE)
        staged = torch.zeros(1, 3, sequences, dtype=torch.int32).pin_memory()
        turn = torch.zeros(1, dtype=torch.int32, device=DEVICE)

        def finish(i: int) -> None:
            store_outputs(results, staged, turn, pdl)  # noqa: B023

        report.add(f"store outputs, {sequences} sequences", seconds(finish, 48), 2 * results.nbytes)


def measure_rows(name: str, shape: Shape, report: Report) -> None:
    """Rows out of tables: embeddings at a step's start, and before its end the rows to go on with,
    of 8192 tokens."""
    ops = make_triton_ops(torch.bfloat16, DEVICE)
    table = Packed("dense", (shape.vocab, shape.hidden), (normal(shape.vocab, shape.hidden),))
    for rows in (1, 256, 8192):
        num_bytes = 2 * 2 * rows * shape.hidden
        ids = [indices(rows, shape.vocab) for _ in range(spread(num_bytes))]
        took = seconds(lambda i: ops.embed(ids[i], table), len(ids))  # noqa: B023
        report.add(f"{name} embedding, {rows} rows", took, num_bytes)
    for rows in (1, 256):
        x = [normal(8192, shape.hidden) for _ in range(spread(2 * 8192 * shape.hidden))]
        wanted = indices(rows, 8192)
        took = seconds(lambda i: ops.gather_rows(x[i], wanted), len(x))  # noqa: B023
        report.add(f"{name} gather_rows, {rows} rows", took, 2 * 2 * rows * shape.hidden)


def indices(count: int, below: int) -> Tensor:
    return torch.randint(below, (count,), device=DEVICE, dtype=torch.int32)


def measure_products(name: str, shape: Shape, report: Report) -> None:
    ops = make_triton_ops(torch.bfloat16, DEVICE)
    width = 64 * (shape.heads + 2 * shape.groups)
    gated = 2 if shape.activation == "silu_gated" else 1
    sizes: dict[str, tuple[int, int, Activation]] = {
        "qkv": (width, shape.hidden, "none"),
        "attention output": (shape.hidden, 64 * shape.heads, "none"),
        "MLP up": (gated * shape.inner, shape.hidden, shape.activation),
        "MLP down": (shape.hidden, shape.inner, "none"),
    }
    for label, (n, k, activation) in sizes.items():
        num_bytes = 2 * n * k
        weights = [Packed("dense", (n, k), (normal(n, k),)) for _ in range(spread(num_bytes))]
        for batch in BATCHES:
            x, bias = normal(batch, k), normal(n)

            def run(i: int, x: Tensor = x, bias: Tensor = bias) -> object:
                return ops.linear(x, weights[i], bias, activation)  # noqa: B023

            took = seconds(run, len(weights))
            report.add(f"{name} {label}, {batch} rows", took, num_bytes, 2.0 * batch * n * k)


def measure_norm(name: str, shape: Shape, report: Report) -> None:
    ops = make_triton_ops(torch.bfloat16, DEVICE)
    gain, bias = normal(shape.hidden).float(), normal(shape.hidden).float()
    for rows in (1, 256, 8192):
        num_bytes = 4 * 2 * rows * shape.hidden  # two read, two written
        copies = spread(num_bytes)
        pairs = [(normal(rows, shape.hidden), normal(rows, shape.hidden)) for _ in range(copies)]
        took = seconds(lambda i: ops.layer_norm(*pairs[i], gain, bias, 1e-5), copies)  # noqa: B023
        report.add(f"{name} residual and norm, {rows} rows", took, num_bytes)


def pages(sequences: int, queries: int, context: int) -> ForwardBatch:
    """Sequences of ``context`` tokens, the last ``queries`` of them in this step."""
    per_seq = -(-context // PAGE)
    tables = torch.randperm(sequences * per_seq, dtype=torch.int32).view(sequences, per_seq)
    positions = torch.arange(context - queries, context, dtype=torch.int32).repeat(sequences)
    owner = torch.arange(sequences).repeat_interleave(queries)
    slots = tables[owner, positions // PAGE] * PAGE + positions % PAGE
    starts = torch.arange(sequences + 1, dtype=torch.int32) * queries
    ids = torch.zeros(sequences * queries, dtype=torch.int32)
    lengths = torch.full((sequences,), context, dtype=torch.int32)
    paged = (PagedIndex(slots.to(DEVICE), tables.to(DEVICE)),)
    first, second, *rest = [t.to(DEVICE) for t in (ids, positions, starts, lengths, starts[1:])]
    return ForwardBatch(first, second, paged, *rest, max_query=queries, max_context=context)


def measure_writes(name: str, shape: Shape, report: Report) -> None:
    """A prompt's keys and values into the cache, rotated where the model does that; queries then
    are written too."""
    ops = make_triton_ops(torch.bfloat16, DEVICE)
    spec = AttentionSpec(shape.heads, shape.groups, 64, 0.125)
    angles = torch.randn(1024, 32, device=DEVICE)
    rope = Rope(angles.cos(), angles.sin()) if shape.rotated else None
    for sequences, queries in ((1, 100), (8, 1000)):
        batch = pages(sequences, queries, queries)
        blocks = batch.paged[0].block_tables.numel()
        tokens, cache = sequences * queries, (blocks, shape.groups, PAGE, 64)
        width = 64 * (shape.heads + 2 * shape.groups)
        moved = width if shape.rotated else 2 * 64 * shape.groups  # numbers, each way
        num_bytes = 2 * 2 * tokens * moved
        copies = [
            (normal(tokens, width), normal(*cache), normal(*cache))
            for _ in range(spread(num_bytes))
        ]

        def run(i: int) -> object:
            qkv, keys, values = copies[i]  # noqa: B023
            return ops.write_kv(qkv, batch, keys, values, spec, rope, None, None, 0.0)  # noqa: B023

        took = seconds(run, len(copies))
        report.add(f"{name} cache write, {sequences} x {queries}", took, num_bytes)


def measure_attention(name: str, shape: Shape, report: Report) -> None:
    """A step's attention with the new tokens' rotation (none here) and storing in it."""
    ops = make_triton_ops(torch.bfloat16, DEVICE)
    assert ops.attend is not None
    attend = ops.attend
    sinks = torch.randn(shape.heads, device=DEVICE) if shape.sinks else None
    cases = [(batch, 1, CONTEXT) for batch in BATCHES] + [(64, 1, 1000), (8, 1000, 1000)]
    for window in shape.windows:
        spec = AttentionSpec(shape.heads, shape.groups, 64, 0.125, window=window)
        for sequences, queries, context in cases:
            batch = pages(sequences, queries, context)
            blocks = batch.paged[0].block_tables.numel()
            cache_bytes = 2 * 2 * blocks * PAGE * shape.groups * 64
            caches = [
                (normal(blocks, shape.groups, PAGE, 64), normal(blocks, shape.groups, PAGE, 64))
                for _ in range(spread(cache_bytes))
            ]
            qkv = normal(sequences * queries, 64 * (shape.heads + 2 * shape.groups))

            def run(i: int, qkv: Tensor = qkv) -> object:
                return attend(qkv, batch, *caches[i], spec, None, None, None, 0.0, sinks)  # noqa: B023

            seen = min(context, window or context)
            read = 2 * 2 * sequences * (seen if queries == 1 else context) * shape.groups * 64
            pairs = sequences * (seen if queries == 1 else queries * seen - seen * seen // 2)
            label = f"{name} attention, {sequences} x {queries} of {context}, window {window}"
            work = 4.0 * pairs * 64 * shape.heads
            report.add(label, seconds(run, len(caches)), read + qkv.nbytes, work)


def measure_experts(name: str, shape: Shape, report: Report) -> None:
    """A layer's norm, choice and experts. Bytes are those of the experts that any token chose, each
    once."""
    ops = make_triton_ops(torch.bfloat16, DEVICE)
    assert ops.pack_experts is not None
    assert ops.norm_experts is not None
    run_layer, spec = ops.norm_experts, ExpertsSpec(32, 4, shape.hidden, "swiglu_clamped")
    layers = [ops.pack_experts(random_experts(spec, shape.hidden), spec) for _ in range(4)]
    router = Packed("dense", (32, shape.hidden), (normal(32, shape.hidden) * 0.02,))
    gain, bias = normal(shape.hidden).float(), torch.zeros(32, device=DEVICE)
    each = 3 * shape.hidden**2 * 4.25 / 8
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192):
        xs = [normal(tokens, shape.hidden) for _ in range(8)]
        chosen = [route(rms_norm(x, None, gain, 1e-5)[0], router, bias, spec)[0] for x in xs]
        distinct = sum(len(experts.unique()) for experts in chosen) / len(xs)

        def run(i: int, xs: list[Tensor] = xs) -> object:
            return run_layer(xs[i], xs[i - 1], gain, 1e-5, router, bias, layers[i % 4])

        work = 2.0 * tokens * spec.top_k * 3 * shape.hidden**2
        report.add(f"{name} experts, {tokens} tokens", seconds(run, len(xs)), distinct * each, work)


def random_experts(spec: ExpertsSpec, hidden: int) -> Experts:
    def weight(rows: int, columns: int) -> Mxfp4:
        shape = (rows, columns // 32)
        scales = torch.full(shape, 120, dtype=torch.uint8, device=DEVICE)
        codes = torch.randint(256, (*shape, 16), dtype=torch.uint8, device=DEVICE)
        return Mxfp4(codes, scales)

    up, down = spec.num_experts * 2 * spec.width, spec.num_experts * hidden
    return Experts(weight(up, hidden), normal(up), weight(down, spec.width), normal(down))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(SHAPES))
    names = parser.parse_args().models.split(",")
    with torch.inference_mode():
        report = measure_ceilings()
        measure_staging(report)
        for name in names:
            if SHAPES[name].inner:
                measure_rows(name, SHAPES[name], report)
                measure_norm(name, SHAPES[name], report)
                measure_products(name, SHAPES[name], report)
            measure_writes(name, SHAPES[name], report)
            measure_attention(name, SHAPES[name], report)
            if not SHAPES[name].inner:
                measure_experts(name, SHAPES[name], report)
    results = {"bandwidth": report.bandwidth, "peak": report.peak, "rows": report.rows}
    path = write("gpu-kernels", {"device": torch.cuda.get_device_name(), "numbers": results})
    print(f"\nWrote {path}")


if __name__ == "__main__":
    main()
