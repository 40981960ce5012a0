"""Mixtures of experts in plain torch against the sum over all experts that they stand for."""

import pytest
import torch

from ruvon.kernels.ops import Dense, Experts, ExpertsSpec, Mxfp4
from ruvon.kernels.reference import activate, make_torch_ops


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("activation", ["silu_gated", "swiglu_clamped"])
def test_experts_are_a_weighted_sum(renormalize, activation):
    torch.manual_seed(0)
    tokens, count, hidden, width = 7, 5, 12, 6
    spec = ExpertsSpec(count, 2, width, activation, renormalize)
    up, down = torch.randn(count, 2 * width, hidden) * 3, torch.randn(count, hidden, width)
    up_bias, down_bias = torch.randn(count, 2 * width), torch.randn(count, hidden)
    router, router_bias, x = (
        torch.randn(count, hidden),
        torch.randn(count),
        torch.randn(tokens, hidden),
    )
    ops = make_torch_ops(torch.float32, torch.device("cpu"))
    weights = Experts(
        Dense(up.flatten(0, 1)), up_bias.flatten(), Dense(down.flatten(0, 1)), down_bias.flatten()
    )
    y = ops.experts(x, ops.pack(Dense(router)), router_bias, ops.pack_experts(weights, spec))

    probs = (x @ router.T + router_bias).softmax(-1)
    kept, _ = probs.topk(2)
    probs = probs * (probs >= kept[:, -1:])
    if renormalize:
        probs = probs / probs.sum(-1, keepdim=True)
    inner = activate(torch.einsum("tc,enc->ten", x, up) + up_bias, activation)
    each = torch.einsum("tei,eci->tec", inner, down) + down_bias
    torch.testing.assert_close(y, (each * probs.unsqueeze(-1)).sum(1), rtol=1e-4, atol=1e-4)


def test_mxfp4_has_the_values_of_its_definition():
    codes = torch.arange(16, dtype=torch.uint8).repeat(1, 2, 1) | (
        torch.arange(16, dtype=torch.uint8).flip(0).repeat(1, 2, 1) << 4
    )
    scales = torch.tensor([[127, 120]], dtype=torch.uint8)
    values = Mxfp4(codes, scales).dequantize()
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    table = magnitudes + [-value for value in magnitudes]
    first = [value for low in range(16) for value in (table[low], table[15 - low])]
    assert values.tolist() == [first + [value / 128 for value in first]]
