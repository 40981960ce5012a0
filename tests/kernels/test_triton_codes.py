"""Products of weights kept as codes, and rows of tables of them, against the values they stand for:
compiled where there is a GPU, in Triton's interpreter (float32 only) where there is none."""

import pytest
import torch

from ruvon.kernels import reference
from ruvon.kernels.ops import Dense, Packed, Quantized, Stacked
from ruvon.kernels.triton_ops import make_triton_ops
from ruvon.models.quantize import to_int4, to_int8

pytestmark = pytest.mark.usefixtures("triton_device", "seeded")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def quantized(outputs, columns, group=32, bits=8, zero=0, offsets=False):
    """Of random codes, as checkpoints have them."""
    low, high = (-128, 128) if bits == 8 else (0, 2**bits)
    codes = torch.randint(low, high, (outputs, columns)).to(torch.int8)
    scales = (torch.rand(outputs, columns // group) * 2**-bits + 0.001).half()
    return Quantized(codes, scales, torch.randn_like(scales) * 0.1 if offsets else None,
                     group, bits, zero)  # fmt: skip


def k_quant(outputs, columns):
    """Scales that are small integers, multiplied by a block's."""
    codes = torch.randint(0, 64, (outputs, columns)).to(torch.int8)
    scales = torch.randint(-128, 128, (outputs, columns // 16)).to(torch.int8)
    blocks = (torch.rand(outputs, columns // 256, 1) * 1e-4).half()
    return Quantized(codes, scales, None, 16, 6, zero=32, blocks=blocks)


CODES = {
    "int8": lambda n, k: to_int8(Dense(torch.randn(n, k) * 0.1)),
    "int4": lambda n, k: to_int4(Dense(torch.randn(n, k) * 0.1)),
    "Q4_0": lambda n, k: quantized(n, k, bits=4, zero=8),
    "Q5_1": lambda n, k: quantized(n, k, bits=5, offsets=True),
    "Q8_0": lambda n, k: quantized(n, k),
    "Q6_K": lambda n, k: k_quant(n, -(-k // 256) * 256),
    "Q4_0 above Q6_K": lambda n, k: Stacked(
        (quantized(32, -(-k // 256) * 256, bits=4, zero=8), k_quant(n - 32, -(-k // 256) * 256))
    ),
}


def assert_near(actual, expected, dtype):
    """Scales of codes are rounded: to float16, and to bfloat16 where that is computed in."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < {torch.float32: 1e-3, torch.float16: 3e-3, torch.bfloat16: 1.6e-2}[dtype], error


PRODUCTS = [(kind, activation) for kind in CODES for activation in ("none", "silu_gated")
            if GPU or activation == "none" or kind in ("int8", "int4")]  # fmt: skip


@pytest.mark.parametrize(("kind", "activation"), PRODUCTS)
@pytest.mark.parametrize("rows", [1, 2, 5, 33, 130, 600] if GPU else [1, 5])
@pytest.mark.parametrize(("n", "k"), [(96, 64), (70, 160)] if GPU else [(34, 96)])
def test_products_of_codes(ops, dtype, kind, rows, activation, n, k):
    weight = CODES[kind](n, k)
    values, packed = weight.dequantize().to(DEVICE), ops.pack(weight)
    assert packed.kind in ("int8", "int4")
    x, bias = randn(rows, values.shape[1], dtype=dtype), randn(n, dtype=dtype)
    plain = Packed("dense", packed.shape, (values,))
    expected = reference.linear(x.float(), plain, bias.float(), activation)
    assert_near(ops.linear(x, packed, bias, activation), expected, dtype)
    if activation == "none":
        assert_near(ops.linear_into(x, packed, bias, x.new_empty(rows, n)), expected, dtype)
    assert_near(ops.logits(x, packed), reference.logits(x.float(), plain), dtype)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_longer_than_a_plain_weights_may_be(ops, dtype, kind):
    weight = CODES[kind](9, 8256)
    x, packed = randn(1, 8256, dtype=dtype), ops.pack(weight)
    plain = Packed("dense", packed.shape, (weight.dequantize().to(DEVICE),))
    expected = reference.linear(x.float(), plain, None, "none")
    assert_near(ops.linear(x, packed, None, "none"), expected, dtype)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # numpy's, interpreting
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_row_with_what_is_no_number_has_no_product(ops, dtype, kind):
    x, packed = randn(2, 96, dtype=dtype), ops.pack(CODES[kind](34, 96))
    x[1, 40] = float("nan")
    whole, broken = ops.linear(x, packed, None, "none")
    assert whole.isfinite().all()
    assert broken.isnan().all()


@pytest.mark.parametrize("kind", CODES)
def test_rows_of_codes(ops, dtype, kind):
    weight = CODES[kind](70, 160)
    ids = torch.tensor([0, 69, 5, 5], dtype=torch.int32, device=DEVICE)
    expected = weight.dequantize().to(DEVICE)[ids.long()]
    packed = ops.pack(weight)
    assert_near(ops.embed(ids, packed), expected, dtype)
    absent = torch.tensor([-1, 70], dtype=torch.int32, device=DEVICE)  # another rank has them
    assert not ops.embed(absent + 9, packed, 9).any()
    assert_near(ops.embed(ids + 9, packed, 9), expected, dtype)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(("centered", "residual"), [(False, True), (True, False)])
def test_norm_inside_a_product_of_codes(ops, dtype, kind, centered, residual):
    x, gain, shift = randn(2, 224, dtype=dtype), randn(224), randn(224)
    other = randn(2, 224, dtype=dtype) if residual else None
    weight = CODES[kind](20, 224)
    norm_bias = shift if centered else None
    packed = ops.pack(weight)
    actual, total = ops.norm_linear(x, other, gain, norm_bias, 1e-5, packed, None, "silu_gated")
    norm = (gain, shift, 1e-5) if centered else (gain, 1e-5)
    normed, expected_total = (reference.layer_norm if centered else reference.rms_norm)(
        x, other, *norm
    )
    plain = Packed("dense", packed.shape, (weight.dequantize().to(DEVICE),))
    assert_near(actual, reference.linear(normed.float(), plain, None, "silu_gated"), dtype)
    assert_near(total, expected_total, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="numpy, in the interpreter, adds as it likes")
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 33, 64, 65, 129])
def test_no_product_of_codes_depends_on_its_number_of_rows(kind, rows):
    ops = make_triton_ops(torch.bfloat16, DEVICE, batch_invariant=True)
    packed = ops.pack(CODES[kind](160, 768))
    x = randn(300, 768, dtype=torch.bfloat16)
    for product in (lambda x: ops.linear(x, packed, None, "silu_gated"),
                    lambda x: ops.logits(x, packed)):  # fmt: skip
        assert torch.equal(product(x[7 : 7 + rows]), product(x)[7 : 7 + rows])


def test_small_weights_are_multiplied_out():
    ops = make_triton_ops(torch.float32, DEVICE, fewest_codes=64 * 96)
    weights = (to_int8(Dense(torch.randn(n, 96))) for n in (32, 64))
    assert [ops.pack(weight).kind for weight in weights] == ["dense", "int8"]
