"""Small models as bare sequences of operations, and batches for them, for tests of CPU graphs."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from ruvon.kernels.ops import (
    AttentionSpec,
    Dense,
    Experts,
    ExpertsSpec,
    ForwardBatch,
    Mxfp4,
    Ops,
    PagedIndex,
    Quantized,
    Rope,
)

PAGE, BLOCKS, VOCAB, POSITIONS = 16, 96, 77, 512


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def random_quantized(
    n, k, bits, *, offsets=True, group=32, dtype=torch.float16, zero=0, blocks=False
):
    """``blocks``: scales are small integers, times a float16 for each 256 values."""
    low, high = (-128, 128) if bits == 8 else (0, 1 << bits)
    codes, groups = torch.randint(low, high, (n, k)).to(torch.int8), -(-k // group)
    if blocks:
        scales = torch.randint(-128 if zero else 0, 128 if zero else 64, (n, groups))
        over = (torch.rand(n, k // 256, 2 if offsets else 1) * 1e-4).half()
        shift = torch.randint(0, 64, (n, groups)).to(torch.int8) if offsets else None
        return Quantized(codes, scales.to(torch.int8), shift, group, bits, zero, over)
    scales = (torch.rand(n, groups) * 0.01 + 0.001).to(dtype)
    shift = None
    if offsets:
        shift = (-7 * scales.float() + torch.rand_like(scales.float()) * 0.01).to(dtype)
    return Quantized(codes, scales, shift, group, bits, zero)


def random_mxfp4(n, k):
    codes = torch.randint(0, 256, (n, k // 32, 16), dtype=torch.uint8)
    return Mxfp4(codes, torch.randint(119, 123, (n, k // 32), dtype=torch.uint8))


def round_activations(x):
    """What quantizing activations to int8 in groups of 32 makes of them."""
    m, k = x.shape
    groups = torch.nn.functional.pad(x, (0, -k % 32)).view(m, -1, 32)
    peaks = groups.abs().amax(-1, keepdim=True)
    codes = (groups * torch.where(peaks > 0, 127 / peaks, 0)).round()
    return (codes * (peaks / 127)).view(m, -1)[:, :k]


@dataclass
class Shape:
    hidden: int = 64
    wide: int = 96
    heads: int = 4
    groups: int = 2
    dim: int = 16
    layers: int = 2
    window: int = 0
    quantized: bool = True
    dtype: torch.dtype = torch.float32  # of weights that are not quantized
    gpt: bool = False  # layer norms, biases, learned positions, no gate
    experts: int = 0  # of 4-bit floats, two for each token
    qk_norm: bool = False
    sinks: bool = False


class SmallModel:
    """The weights of a model of some shape, packed by ``ops``; the same ones for the same seed."""

    def __init__(self, ops: Ops, shape: Shape, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.ops, self.shape = ops, shape
        c, s = shape.hidden, shape
        self.spec = AttentionSpec(s.heads, s.groups, s.dim, s.dim**-0.5, s.window)
        self.table = self.pack(VOCAB, c, 8)
        self.positions = self.pack(POSITIONS, c, 8)
        angles = torch.arange(POSITIONS).unsqueeze(1) * 10.0 ** -torch.linspace(0, 2, s.dim // 2)
        self.rope = None if s.gpt else Rope(angles.cos(), angles.sin())
        self.layers = [self.layer() for _ in range(s.layers)]
        self.last = self.norm()

    def pack(self, n, k, bits):
        if not self.shape.quantized:
            return self.ops.pack(Dense((torch.randn(n, k) / k**0.5).to(self.shape.dtype)))
        return self.ops.pack(random_quantized(n, k, bits, offsets=bits == 4))

    def norm(self):
        c = self.shape.hidden
        return torch.rand(c) + 0.5, torch.randn(c) * 0.1 if self.shape.gpt else None

    def layer(self):
        s = self.shape
        width = s.wide if s.gpt else 2 * s.wide
        bias = (lambda n: torch.randn(n) * 0.1) if s.gpt else (lambda n: None)
        total = (s.heads + 2 * s.groups) * s.dim
        return {
            "norms": (self.norm(), self.norm()),
            "qkv": (self.pack(total, s.hidden, 4), bias(total)),
            "out": (self.pack(s.hidden, s.heads * s.dim, 4), bias(s.hidden)),
            "up": (self.pack(width, s.hidden, 4), bias(width)),
            "down": (self.pack(s.hidden, s.wide, 4), bias(s.hidden)),
            "experts": self.experts() if s.experts else None,
            "q_norm": torch.rand(s.dim) if s.qk_norm else None,
            "k_norm": torch.rand(s.dim) if s.qk_norm else None,
            "sinks": torch.randn(s.heads) if s.sinks else None,
        }

    def experts(self):
        s, n = self.shape, self.shape.experts
        weights = Experts(
            random_mxfp4(n * 2 * s.wide, s.hidden), torch.randn(n * 2 * s.wide),
            random_mxfp4(n * s.hidden, s.wide), torch.randn(n * s.hidden),
        )  # fmt: skip
        spec = ExpertsSpec(n, 2, s.wide, "swiglu_clamped")
        router = self.ops.pack(Dense(torch.randn(n, s.hidden)))
        return router, torch.randn(n), self.ops.pack_experts(weights, spec)

    def mix(self, x, layer):
        if layer["experts"]:
            return self.ops.experts(x, *layer["experts"])
        x = self.ops.linear(x, *layer["up"], "gelu_tanh" if self.shape.gpt else "silu_gated")
        return self.ops.linear(x, *layer["down"], "none")

    def normed(self, x, residual, norm):
        weight, bias = norm
        if bias is None:
            return self.ops.rms_norm(x, residual, weight, 1e-5)
        return self.ops.layer_norm(x, residual, weight, bias, 1e-5)

    def forward(self, batch, cache):
        ops, x, residual = self.ops, self.ops.embed(batch.token_ids, self.table), None
        if self.shape.gpt:
            x = ops.add(x, ops.embed(batch.positions, self.positions))
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            x, residual = self.normed(x, residual, layer["norms"][0])
            x = ops.linear(x, *layer["qkv"], "none")
            q = ops.write_kv(
                x, batch, keys, values, self.spec, self.rope,
                layer["q_norm"], layer["k_norm"], 1e-6,
            )  # fmt: skip
            x = ops.attention(q, keys, values, batch, self.spec, layer["sinks"])
            x = ops.linear(x, *layer["out"], "none")
            x, residual = self.normed(x, residual, layer["norms"][1])
            x = self.mix(x, layer)
        x, _ = self.normed(x, residual, self.last)
        return ops.logits(ops.gather_rows(x, batch.logit_rows), self.table)


class Prompts:
    """Sequences of random tokens whose blocks lie scattered over a cache."""

    def __init__(self, lengths, seed=0):
        rng = random.Random(seed)
        self.tokens = [[rng.randrange(VOCAB) for _ in range(n)] for n in lengths]
        free = list(range(BLOCKS))
        rng.shuffle(free)
        self.blocks = [[free.pop() for _ in range(-(-n // PAGE))] for n in lengths]

    def batch(self, *chunks, every_row=True):
        """A chunk is (sequence, start, end): its tokens from start to end."""
        ids, positions, slots, starts, contexts = [], [], [], [0], []
        for s, start, end in chunks:
            ids += self.tokens[s][start:end]
            positions += range(start, end)
            table = self.blocks[s]
            slots += [table[at // PAGE] * PAGE + at % PAGE for at in range(start, end)]
            starts.append(len(ids))
            contexts.append(end)
        longest = max(len(self.blocks[s]) for s, *_ in chunks)
        tables = [self.blocks[s] + [0] * (longest - len(self.blocks[s])) for s, *_ in chunks]
        rows = list(range(len(ids))) if every_row else [end - 1 for end in starts[1:]]
        paged = (PagedIndex(ints(slots), ints(tables)),)
        queries = max(end - start for _, start, end in chunks)
        return ForwardBatch(
            ints(ids), ints(positions), paged, ints(starts), ints(contexts), ints(rows),
            queries, max(contexts),
        )  # fmt: skip
