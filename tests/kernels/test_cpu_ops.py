"""Each operation of the CPU kernels against its meaning in plain torch, computed at once."""

import pytest
import torch
from cpu_models import ints, random_quantized, round_activations

from ruvon.errors import LoadError
from ruvon.kernels.cpu.isa import choose
from ruvon.kernels.ops import Dense, Quantized, Stacked

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu", "silu_gated", "gelu_tanh_gated")
FORMATS = {
    "q4_1": {"bits": 4},
    "q4_0": {"bits": 4, "offsets": False, "zero": 8},
    "q4 without offsets": {"bits": 4, "offsets": False},
    "q5_0": {"bits": 5, "offsets": False, "zero": 16},
    "q5_1": {"bits": 5},
    "q8_0": {"bits": 8, "offsets": False},
    "q4_k": {"bits": 4, "blocks": True},
    "q5_k": {"bits": 5, "blocks": True},
    "q6_k": {"bits": 6, "offsets": False, "group": 16, "zero": 32, "blocks": True},
    "halves": {"bits": 8, "offsets": False, "group": 16},
    "groups of 64": {"bits": 4, "group": 64, "dtype": torch.float32},
    "one scale a row": {"bits": 8, "offsets": False, "group": 256, "dtype": torch.float32},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(got, expected, tolerance=2e-6):
    """Within ``tolerance`` of the largest number expected."""
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"off by {error:.1e}"


@pytest.mark.parametrize("width", [1, 16, 50, 576])
@pytest.mark.parametrize("with_residual", [False, True])
def test_norms(cpu, reference, width, with_residual):
    x, weight, bias = torch.randn(5, width) * 3, torch.randn(width), torch.randn(width)
    residual = torch.randn(5, width) if with_residual else None
    got = cpu.ops.rms_norm(x, residual, weight, 1e-5)
    expected = reference.rms_norm(x, residual, weight, 1e-5)
    assert_close(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    got = cpu.ops.layer_norm(x, residual, weight, bias, 1e-5)
    expected = reference.layer_norm(x, residual, weight, bias, 1e-5)
    assert_close(got[0], expected[0], 1e-5)
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("kernels", ["cpu", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 5), (9, 70, 51), (130, 64, 96)])
def test_dense_linear(request, reference, kernels, dtype, shape):
    m, n, k = shape
    ops = request.getfixturevalue(kernels).ops
    x, weight, bias = torch.randn(m, k), Dense(torch.randn(n, k).to(dtype)), torch.randn(n)
    packed, plain = ops.pack(weight), reference.pack(weight)
    rounds = dtype == torch.bfloat16 and kernels == "cpu" and choose(None).bf16
    seen = x.bfloat16().float() if rounds else x
    for activation in ACTIVATIONS if n % 2 == 0 else ("none",):
        got = ops.linear(x, packed, bias, activation)
        assert_close(got, reference.linear(seen, plain, bias, activation))


@pytest.mark.skipif(not choose(None).bf16, reason="the CPU has no dot product of bfloat16")
def test_activations_become_the_nearest_bfloat16(cpu):
    """Of two that are equally near, the even one."""
    step = 2.0**-7  # between neighbours from 1 to 2
    x = torch.tensor([[1.0, 1 + step / 2, 1 + 1.5 * step, -1 - step / 2, 1 + 0.51 * step, 3e38]])
    same = cpu.ops.pack(Dense(torch.eye(6, dtype=torch.bfloat16)))
    got = cpu.ops.linear(x, same, None, "none")
    assert got[0, :5].tolist() == [1, 1, 1 + 2 * step, -1, 1 + step]
    assert torch.equal(got, x.bfloat16().float())


@pytest.mark.parametrize("kernels", ["cpu", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_rows_do_not_depend_on_others(request, kernels, dtype):
    ops = request.getfixturevalue(kernels).ops
    x, weight = torch.randn(150, 77), ops.pack(Dense(torch.randn(70, 77).to(dtype)))
    together = ops.linear(x, weight, None, "none")
    for first, last in ((0, 1), (5, 8), (126, 130), (140, 149)):
        assert torch.equal(ops.linear(x[first:last], weight, None, "none"), together[first:last])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 3, 8, 13, 150])
def test_quantized_linear(cpu, reference, name, rows):
    weight = random_quantized(96, 512, **FORMATS[name])
    x = torch.randn(rows, 512) * torch.rand(rows, 1) * 10
    x[rows // 2, 32:64] = 0  # a group without a largest value
    packed, plain = cpu.ops.pack(weight), reference.pack(weight)
    expected = reference.linear(round_activations(x), plain, None, "none")
    assert_close(cpu.ops.linear(x, packed, None, "none"), expected)


@pytest.mark.parametrize("name", ["q4_1", "q5_k", "q6_k", "q8_0"])
@pytest.mark.parametrize("rows", [1, 2, 13])
def test_no_number_becomes_none(cpu, portable, name, rows):
    """Integers have no NaN, but what is made of one has to be."""
    weight, x = random_quantized(32, 256, **FORMATS[name]), torch.randn(rows, 256)
    bad = x.clone()
    bad[-1, 77] = torch.nan
    for ops in (cpu.ops, portable.ops):
        packed = ops.pack(weight)
        right, out = (ops.linear(each, packed, None, "none") for each in (x, bad))
        assert out[-1].isnan().all()
        assert torch.equal(out[:-1], right[:-1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [64, 96, 128])  # halves of 32, 48 (not whole tiles) and 64
def test_epilogues(cpu, reference, activation, n):
    weight, bias = random_quantized(n, 96, 4), torch.randn(n)
    x = torch.randn(11, 96)
    packed, plain = cpu.ops.pack(weight), reference.pack(weight)
    expected = reference.linear(round_activations(x), plain, bias, activation)
    assert_close(cpu.ops.linear(x, packed, bias, activation), expected)


@pytest.mark.parametrize("name", ["q4_1", "q5_k", "q6_k", "q8_0"])
def test_every_instruction_set_gives_the_same_bits(cpu, lesser, name):
    weight, x = random_quantized(64, 256, **FORMATS[name]), torch.randn(13, 256)
    outs = [
        kernels.ops.linear(x, kernels.ops.pack(weight), None, "silu_gated")
        for kernels in (cpu, lesser)
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize("activation", ["none", "relu", "silu_gated"])
def test_parts_of_different_formats(cpu, reference, activation):
    """As q, k and v of a Q4_K_M file."""
    parts = (random_quantized(64, 256, **FORMATS["q4_k"]), random_quantized(48, 256, 8))
    weight, bias, x = Stacked(parts), torch.randn(112), torch.randn(11, 256)
    packed, plain = cpu.ops.pack(weight), reference.pack(weight)
    expected = reference.linear(round_activations(x), plain, bias, activation)
    assert_close(cpu.ops.linear(x, packed, bias, activation), expected)


@pytest.mark.parametrize("name", ["q4_0", "q5_0", "q6_k", "q8_0"])
def test_extreme_codes_do_not_overflow(cpu, reference, name):
    """The largest integers that a group can sum to."""
    weight = random_quantized(32, 256, **FORMATS[name])
    high = 127 if weight.bits == 8 else 2**weight.bits - 1
    weight.codes_NK[::2], weight.codes_NK[1::2] = high, -128 if weight.bits == 8 else 0
    x = torch.full((2, 256), 1.0)
    x[1] = -1.0
    expected = reference.linear(x, reference.pack(weight), None, "none")
    assert_close(cpu.ops.linear(x, cpu.ops.pack(weight), None, "none"), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_embed_reads_back_what_was_packed(cpu, name):
    weight = random_quantized(70, 256, **FORMATS[name])
    ids = ints([0, 69, 17, 17, 33])
    got = cpu.ops.embed(ids, cpu.ops.pack(weight))
    assert_close(got, weight.dequantize()[ids], 1e-6)
    of_a_rank = cpu.ops.embed(ints([39, 108, 109, 0]), cpu.ops.pack(weight), 39)
    assert torch.equal(of_a_rank[:2], got[:2])
    assert not of_a_rank[2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_embed_dense(cpu, portable, dtype):
    table, ids = torch.randn(70, 51).to(dtype), ints([3, 69, 0])
    for ops in (cpu.ops, portable.ops):
        assert torch.equal(ops.embed(ids, ops.pack(Dense(table))), table[ids].float())


def test_pack_keeps_shape_and_converts_on_demand(cpu):
    packed = cpu.ops.pack(Dense(torch.randn(70, 50)))
    assert packed.shape == (70, 50)


def test_add_and_take(cpu):
    x, y = torch.randn(9, 50), torch.randn(9, 50)
    assert torch.equal(cpu.ops.add(x, y), x + y)
    assert torch.equal(cpu.ops.gather_rows(x, ints([8, 0, 8])), x[[8, 0, 8]])


def test_logits(cpu, reference):
    weight, x = Dense(torch.randn(77, 50)), torch.randn(3, 50)
    expected = reference.logits(x, reference.pack(weight))
    assert_close(cpu.ops.logits(x, cpu.ops.pack(weight)), expected)


def test_results_of_operations_feed_others(cpu, reference):
    x, weight = torch.randn(5, 50), Dense(torch.randn(40, 50))
    normed, total = cpu.ops.rms_norm(x, x, torch.ones(50), 1e-5)
    got = cpu.ops.linear(cpu.ops.add(normed, total), cpu.ops.pack(weight), None, "none")
    normed, total = reference.rms_norm(x, x, torch.ones(50), 1e-5)
    assert_close(got, reference.linear(normed + total, reference.pack(weight), None, "none"))


def test_groups_that_fit_no_tile_are_refused(cpu):
    weight = Quantized(torch.zeros(32, 48, dtype=torch.int8), torch.ones(32, 2), None, 24, 4)
    with pytest.raises(LoadError, match="groups of 24"):
        cpu.ops.pack(weight)
