"""Mixtures of experts and 4-bit floats on the CPU, against their meaning in plain torch."""

import pytest
import torch
from cpu_models import ints, random_mxfp4, random_quantized, round_activations
from test_cpu_ops import assert_close

from ruvon.errors import LoadError
from ruvon.kernels.cpu import CpuKernels
from ruvon.kernels.cpu.experts import pack_experts, without_pairs
from ruvon.kernels.cpu.layout import pack
from ruvon.kernels.ops import Dense, Experts, ExpertsSpec, Mxfp4, Stacked
from ruvon.kernels.reference import activate, route


def dense(n, k):
    return Dense(torch.randn(n, k) / k**0.5)


def q4_k(n, k):
    return random_quantized(n, k, 4, blocks=True)


def q6_k(n, k):
    return random_quantized(n, k, 6, offsets=False, group=16, zero=32, blocks=True)


FORMATS = {"float32": (dense, dense), "mxfp4": (random_mxfp4, random_mxfp4), "k": (q4_k, q6_k)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Layer:
    """A mixture of random experts with a router that prefers the first ones."""

    def __init__(self, formats, spec, hidden, *, biased=True):
        n, (up, down) = spec.num_experts, FORMATS[formats]
        self.spec, self.rounds = spec, formats != "float32"
        self.up, self.down = up(n * 2 * spec.width, hidden), down(n * hidden, spec.width)
        self.router = Dense(torch.randn(n, hidden) / hidden**0.5)
        self.biases = [torch.randn(rows) for rows in (n * 2 * spec.width, n * hidden)]
        self.router_bias = torch.linspace(2, 0, n)
        if not biased:
            self.biases, self.router_bias = [None, None], None

    def on(self, kernels):
        """What computes it with these kernels."""
        weights = Experts(self.up, self.biases[0], self.down, self.biases[1])
        packed = kernels.ops.pack_experts(weights, self.spec)
        router = kernels.ops.pack(self.router)
        return lambda x: kernels.ops.experts(x, router, self.router_bias, packed)

    def expected(self, x, reference):
        """What it comes to where activations are rounded as the kernels do."""
        seen = round_activations if self.rounds else lambda x: x
        n = self.spec.num_experts
        up, down = (reference.pack(w).tensors[0].chunk(n) for w in (self.up, self.down))
        up_bias, down_bias = ([0] * n if b is None else b.chunk(n) for b in self.biases)
        chosen, weights = route(x, reference.pack(self.router), self.router_bias, self.spec)
        y = torch.zeros_like(x)
        for t, row in enumerate(x.split(1)):
            for e, weight in zip(chosen[t].tolist(), weights[t], strict=True):
                inner = activate(seen(row) @ up[e].T + up_bias[e], self.spec.activation)
                y[t] += weight * (seen(inner) @ down[e].T + down_bias[e])[0]
        return y


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 150])
def test_experts(cpu, reference, formats, tokens):
    layer = Layer(formats, ExpertsSpec(6, 3, 256, "swiglu_clamped"), 256)
    x = torch.randn(tokens, 256) * 3
    assert_close(layer.on(cpu)(x), layer.expected(x, reference), 2e-3 if layer.rounds else 4e-6)


@pytest.mark.parametrize("renormalize", [True, False])
def test_gates_of_silu_without_biases(cpu, reference, renormalize):
    spec = ExpertsSpec(8, 2, 64, "silu_gated", renormalize)
    layer, x = Layer("float32", spec, 96, biased=False), torch.randn(9, 96)
    assert_close(layer.on(cpu)(x), layer.expected(x, reference), 4e-6)


@pytest.mark.parametrize(("formats", "hidden", "width"), [("float32", 51, 40), ("mxfp4", 96, 160)])
@pytest.mark.parametrize("experts", [1, 3, 37])
def test_odd_sizes(cpu, reference, formats, hidden, width, experts):
    spec = ExpertsSpec(experts, 1, width, "swiglu_clamped")
    layer, x = Layer(formats, spec, hidden), torch.randn(21, hidden)
    assert_close(layer.on(cpu)(x), layer.expected(x, reference), 2e-3 if layer.rounds else 4e-6)


def test_as_many_experts_as_a_token_can_have(cpu, reference):
    layer, x = Layer("float32", ExpertsSpec(20, 20, 32, "silu_gated"), 32), torch.randn(3, 32)
    assert_close(layer.on(cpu)(x), layer.expected(x, reference), 4e-6)


@pytest.mark.parametrize("formats", ["float32", "mxfp4"])
def test_all_tokens_on_one_expert(cpu, reference, formats):
    """More rows than a panel has, and none for the others."""
    layer = Layer(formats, ExpertsSpec(4, 1, 64, "swiglu_clamped"), 64)
    layer.router_bias = torch.tensor([0.0, 0.0, 100.0, 0.0])
    x = torch.randn(300, 64)
    assert_close(layer.on(cpu)(x), layer.expected(x, reference), 2e-3 if layer.rounds else 4e-6)


@pytest.mark.parametrize("formats", FORMATS)
def test_a_token_does_not_depend_on_others(cpu, formats):
    layer = Layer(formats, ExpertsSpec(6, 3, 256, "swiglu_clamped"), 256)
    experts, x = layer.on(cpu), torch.randn(150, 256)
    together = experts(x)
    for first, last in ((0, 1), (5, 8), (126, 131), (140, 149)):
        assert torch.equal(experts(x[first:last]), together[first:last])
    order = torch.randperm(150)
    assert torch.equal(experts(x[order]), together[order])


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(cpu, lesser):
    layer = Layer("mxfp4", ExpertsSpec(6, 3, 64, "swiglu_clamped"), 96)
    x = torch.randn(33, 96)
    expected = layer.on(cpu)(x)
    assert torch.equal(layer.on(lesser)(x), expected)
    many = CpuKernels(5)
    try:
        assert torch.equal(layer.on(many)(x), expected)
    finally:
        many.close()


def test_equal_logits_choose_the_first_experts(cpu):
    """And a token whose logits are no numbers becomes no number, alone."""
    layer = Layer("float32", ExpertsSpec(5, 2, 32, "silu_gated"), 32)
    layer.router_bias = torch.zeros(5)
    x = torch.zeros(2, 32)
    x[1] = torch.nan
    got = layer.on(cpu)(x)
    inner = [activate(b, "silu_gated") for b in layer.biases[0].chunk(5)[:2]]
    each = zip(inner, layer.down.weight_NK.chunk(5), layer.biases[1].chunk(5), strict=False)
    assert_close(got[0], sum(down @ x + bias for x, down, bias in each) / 2)
    assert got[1].isnan().all()


@pytest.mark.parametrize("rows", [1, 3, 8, 13, 150])
def test_linear_of_4_bit_floats(cpu, reference, rows):
    weight, x = random_mxfp4(70, 96), torch.randn(rows, 96)
    expected = reference.linear(round_activations(x), reference.pack(weight), None, "none")
    assert_close(cpu.ops.linear(x, cpu.ops.pack(weight), None, "none"), expected)


def test_embed_reads_4_bit_floats_back(cpu):
    weight, ids = random_mxfp4(70, 96), ints([0, 69, 17, 17, 33])
    weight.scales_NK[0], weight.codes_NKB[0] = 0, 0  # a group of zeros, as files have it
    assert torch.equal(cpu.ops.embed(ids, cpu.ops.pack(weight)), weight.dequantize()[ids])


def test_powers_of_two_from_the_smallest_to_the_largest(cpu, reference):
    """What would be below 2 ** -126 is nothing."""
    scales = torch.tensor([2, 3, 100, 127, 150, 240], dtype=torch.uint8)
    codes = torch.randint(0, 256, (6, 1, 16), dtype=torch.uint8)
    weight, x = Mxfp4(codes, scales.unsqueeze(1)), torch.full((1, 32), 1.0)
    expected = reference.linear(x, reference.pack(weight), None, "none")
    assert torch.equal(cpu.ops.linear(x, cpu.ops.pack(weight), None, "none"), expected)
    weight.scales_NK.fill_(0)
    assert cpu.ops.linear(x, cpu.ops.pack(weight), None, "none").eq(0).all()


def test_the_largest_sums_do_not_overflow(cpu, lesser, reference):
    weight = Mxfp4(
        torch.full((32, 3, 16), 0x77, dtype=torch.uint8), torch.full((32, 3), 127).byte()
    )
    weight.codes_NKB[16:] = 0xFF
    x = torch.ones(2, 96)
    x[1] = -1.0
    expected = reference.linear(x, reference.pack(weight), None, "none")
    for kernels in (cpu, lesser):
        assert torch.equal(kernels.ops.linear(x, kernels.ops.pack(weight), None, "none"), expected)


def test_a_router_is_multiplied_without_rounding():
    """Also where the CPU has a dot product of bfloat16."""
    router = Dense(torch.randn(37, 51).bfloat16())
    plain, pairs = (pack(router, None, bf16) for bf16 in (False, True))
    laid_out = without_pairs(pairs)
    assert (laid_out.kind, laid_out.shape) == (plain.kind, plain.shape)
    assert torch.equal(laid_out.tensors[0], plain.tensors[0])


def test_parts_of_different_formats_are_refused():
    weights = Experts(Stacked((q4_k(64, 256), q6_k(64, 256))), None, q4_k(64, 256), None)
    with pytest.raises(LoadError, match="gate and what it gates are of different"):
        pack_experts(weights, ExpertsSpec(2, 1, 32, "silu_gated"), None, bf16=False)
