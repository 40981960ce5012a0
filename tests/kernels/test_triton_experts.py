"""Mixtures of experts in Triton against plain torch: compiled where there is a GPU, in Triton's
interpreter (float32 only) where there is none."""

import pytest
import torch

from ruvon.kernels import experts as module
from ruvon.kernels.expert_tiles import ExpertsTile
from ruvon.kernels.expert_weights import pack_experts
from ruvon.kernels.experts import Asking, experts
from ruvon.kernels.ops import Dense, Experts, ExpertsSpec, Mxfp4
from ruvon.kernels.pdl import supports_pdl
from ruvon.kernels.reference import make_torch_ops
from ruvon.kernels.reference import route as plain_route
from ruvon.kernels.routing import route
from ruvon.kernels.split_k import make_workspace
from ruvon.kernels.triton_ops import make_triton_ops

pytestmark = pytest.mark.usefixtures("triton_device", "seeded")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PDL = supports_pdl(DEVICE)
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}


def random_mxfp4(rows, columns, low=118, high=123):
    codes = torch.randint(0, 256, (rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(low, high, (rows, columns // 32), dtype=torch.uint8)
    return Mxfp4(codes, scales)


def random_dense(rows, columns):
    return Dense(torch.randn(rows, columns) * columns**-0.5)


def make_layer(spec, hidden, weight, biased=True):
    num, width = spec.num_experts, spec.width
    biases = (torch.randn(num * 2 * width), torch.randn(num * hidden)) if biased else (None, None)
    return Experts(
        weight(num * 2 * width, hidden), biases[0], weight(num * hidden, width), biases[1]
    )


def assert_close(actual, expected, dtype):
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    assert torch.isfinite(actual).all()
    error = (actual - expected).norm() / expected.norm()
    assert error < TOLERANCES[dtype], f"relative error {error:.2e}"


def check(spec, layer, router, bias, x, dtype, tiles=None, **options):
    plain = make_torch_ops(torch.float32, DEVICE)
    packed = pack_experts(layer, spec, dtype, DEVICE)
    head = make_torch_ops(dtype, DEVICE).pack(router)
    space = make_workspace(DEVICE)
    actual = experts(x, head, bias, packed, space, tiles=tiles, **options)
    assert not space.counters.any()
    expected = plain.experts(
        x.float(), plain.pack(Dense(head.tensors[0])), bias, plain.pack_experts(layer, spec)
    )
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)
    return actual


CASES = [(tokens, clamped) for tokens in (1, 2, 7, 16, 17, 70) for clamped in (False, True)]
if not GPU:
    CASES = [(1, False), (7, True), (18, False)]  # the interpreter is slow


@pytest.mark.parametrize(("tokens", "clamped"), CASES)
@pytest.mark.parametrize("weight", [random_mxfp4, random_dense])
def test_experts(dtype, tokens, weight, clamped):
    activation = "swiglu_clamped" if clamped else "silu_gated"
    spec = ExpertsSpec(5, 2, 96, activation, renormalize=clamped)
    layer = make_layer(spec, 160, weight, biased=clamped)
    bias = torch.randn(5, device=DEVICE) if clamped else None
    x = torch.randn(tokens, 160, device=DEVICE).to(dtype)
    check(spec, layer, random_dense(5, 160), bias, x, dtype)


@pytest.mark.parametrize(
    "tile",
    [
        ExpertsTile(16, 64, 64, 2),
        ExpertsTile(32, 128, 128, 3, bulk=True),
        ExpertsTile(64, 64, 256, 2, 8, bulk=True, overlap=True),
    ],
)
@pytest.mark.parametrize("weight", [random_mxfp4, random_dense])
def test_tiles_that_nothing_fills(dtype, weight, tile):
    spec = ExpertsSpec(3, 2, 48 if weight is random_dense else 96, "swiglu_clamped")
    layer = make_layer(spec, 160, weight)
    x = torch.randn(21, 160, device=DEVICE).to(dtype)
    check(spec, layer, random_dense(3, 160), None, x, dtype, (tile, tile))


@pytest.mark.parametrize(
    "tile",
    [
        ExpertsTile(8, 64, 256, 2, split=True),
        ExpertsTile(8, 32, 512, 3, split=True, late=True),
        ExpertsTile(16, 16, 128, 2, 2, split=True),
    ],
)
@pytest.mark.parametrize(("hidden", "width"), [(160, 96), (352, 32)])
def test_warps_that_split_columns(dtype, tile, hidden, width):
    spec = ExpertsSpec(3, 2, width, "swiglu_clamped")
    x = torch.randn(11, hidden, device=DEVICE).to(dtype)
    layer, router = make_layer(spec, hidden, random_mxfp4), random_dense(3, hidden)
    check(spec, layer, router, None, x, dtype, (tile, tile), pdl=PDL)


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("weight", [random_mxfp4, random_dense])
def test_tiles_of_few_tokens(dtype, weight, bulk):
    """One expert's second tile has no more than `few` tokens, its first and others' have more."""
    spec = ExpertsSpec(4, 2, 32, "swiglu_clamped")
    layer = make_layer(spec, 64, weight)
    bias = torch.tensor([9.0, 0.0, 0.0, 0.0], device=DEVICE)
    x = torch.randn(36, 64, device=DEVICE).to(dtype)
    tile = ExpertsTile(32, 64, 64, 2, bulk=bulk, few=16)
    check(spec, layer, random_dense(4, 64), bias, x, dtype, (tile, tile))


@pytest.mark.parametrize("tokens", [1, 7, 20])
@pytest.mark.parametrize("asking", [1, 3, 100])
def test_what_is_asked_for_comes_first(dtype, monkeypatch, tokens, asking):
    """The second product begins with the last tiles, of which there are fewer than may be."""
    spec = ExpertsSpec(9, 2, 32, "swiglu_clamped")
    layer, router = make_layer(spec, 64, random_mxfp4), random_dense(9, 64)
    x = torch.randn(tokens, 64, device=DEVICE).to(dtype)
    monkeypatch.setattr(module, "_asking", lambda *_: Asking(0, 0))
    plain = check(spec, layer, router, None, x, dtype, pdl=PDL)
    monkeypatch.setattr(module, "_asking", lambda *_: Asking(asking, 64 * 32 // 2))
    assert torch.equal(check(spec, layer, router, None, x, dtype, pdl=PDL), plain)


@pytest.mark.parametrize("tokens", [3, 20])
def test_all_tokens_to_the_same_experts(dtype, tokens):
    """So most experts have none, and two have all."""
    spec = ExpertsSpec(9, 2, 32, "swiglu_clamped")
    layer = make_layer(spec, 64, random_mxfp4)
    bias = torch.zeros(9, device=DEVICE)
    bias[[2, 7]] = 100.0
    x = torch.randn(tokens, 64, device=DEVICE).to(dtype)
    check(spec, layer, random_dense(9, 64), bias, x, dtype)


@pytest.mark.parametrize("tokens", [1, 16, 19])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_inside(dtype, tokens, residual):
    """`norm_experts` is `rms_norm` and `experts`."""
    ops = make_triton_ops(dtype, DEVICE)
    spec = ExpertsSpec(5, 2, 32, "swiglu_clamped")
    packed = ops.pack_experts(make_layer(spec, 96, random_mxfp4), spec)
    router, bias = ops.pack(random_dense(5, 96)), torch.randn(5, device=DEVICE)
    x, gain = torch.randn(tokens, 96, device=DEVICE).to(dtype), torch.randn(96, device=DEVICE)
    other = torch.randn_like(x) if residual else None
    actual, total = ops.norm_experts(x, other, gain, 1e-5, router, bias, packed)
    normed, expected_total = ops.rms_norm(x, other, gain, 1e-5)
    assert torch.equal(total, expected_total)
    assert_close(actual, ops.experts(normed, router, bias, packed), dtype)


def test_scales_of_every_size(dtype):
    """Those above 2 do not fit a bfloat16 beside what codes are unpacked to."""
    spec = ExpertsSpec(3, 1, 32, "silu_gated")
    layer = Experts(
        random_mxfp4(3 * 64, 64, 118, 121), None, random_mxfp4(3 * 64, 32, 121, 134), None
    )
    x = torch.randn(9, 64, device=DEVICE).to(dtype)
    check(spec, layer, random_dense(3, 64), None, x, dtype)


@pytest.mark.parametrize("tokens", [1, 16, 17, 200])
@pytest.mark.parametrize(("num", "tile"), [(5, 16), (128, 64)] if GPU else [(5, 16)])
def test_routing_sorts_entries_into_tiles(dtype, tokens, num, tile):
    spec = ExpertsSpec(num, 4, 32, "silu_gated")
    x = torch.randn(tokens, 48, device=DEVICE).to(dtype)
    head = make_torch_ops(dtype, DEVICE).pack(random_dense(num, 48))
    routing = route(x, head, None, spec, tile, make_workspace(DEVICE), pdl=False)
    chosen, weights = plain_route(x, head, None, spec)
    assert torch.equal(routing.chosen.long(), chosen)
    torch.testing.assert_close(routing.weights, weights)
    order, flat = routing.order.long(), chosen.flatten()
    assert torch.equal(order, flat.sort(stable=True).indices)
    seen = []
    for expert, first, end in routing.tiles.tolist():
        if expert >= 0:
            assert 0 < end - first <= tile
            assert (flat[order[first:end]] == expert).all()
            seen += range(first, end)
    assert seen == list(range(4 * tokens))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [16, 20])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_padding_may_hold_anything(dtype, tokens, value):
    """No expert is chosen twice by a token, so that there are tiles enough."""
    spec = ExpertsSpec(5, 4, 32, "silu_gated")
    x = torch.full((tokens, 48), value, device=DEVICE, dtype=dtype)
    head = make_torch_ops(dtype, DEVICE).pack(random_dense(5, 48))
    routing = route(x, head, None, spec, 8, make_workspace(DEVICE), pdl=False)
    assert all(len(set(chosen)) == 4 for chosen in routing.chosen.tolist())
    covered = [(a, b) for expert, a, b in routing.tiles.tolist() if expert >= 0]
    assert [p for a, b in covered for p in range(a, b)] == list(range(4 * tokens))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_rows_that_are_no_numbers_harm_no_others(dtype):
    spec = ExpertsSpec(5, 2, 32, "silu_gated")
    layer = make_layer(spec, 64, random_mxfp4)
    packed = pack_experts(layer, spec, dtype, DEVICE)
    head = make_torch_ops(dtype, DEVICE).pack(random_dense(5, 64))
    x = torch.randn(6, 64, device=DEVICE).to(dtype)
    right = experts(x, head, None, packed, make_workspace(DEVICE))
    x[2] = float("nan")
    other = experts(x, head, None, packed, make_workspace(DEVICE))
    rest = [0, 1, 3, 4, 5]
    torch.testing.assert_close(other[rest], right[rest])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="too much for the interpreter")
def test_gpt_oss_own_shapes():
    """With the tiles of each number of tokens: of a few entries an expert up to hundreds."""
    spec = ExpertsSpec(32, 4, 2880, "swiglu_clamped")
    layer, router = make_layer(spec, 2880, random_mxfp4), random_dense(32, 2880)
    ops = make_triton_ops(torch.bfloat16, DEVICE)
    plain = make_torch_ops(torch.float32, DEVICE)
    packed, expected = ops.pack_experts(layer, spec), plain.pack_experts(layer, spec)
    router, bias = ops.pack(router), torch.randn(32, device=DEVICE)
    wide_router = plain.pack(Dense(router.tensors[0]))
    for tokens in (1, 8, 40, 100, 300, 2000, 5000):
        x = torch.randn(tokens, 2880, device=DEVICE).bfloat16()
        actual = ops.experts(x, router, bias, packed)
        assert_close(actual, plain.experts(x.float(), wide_router, bias, expected), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="numpy, in the interpreter, adds as it likes")
@pytest.mark.parametrize("weight", [random_mxfp4, random_dense])
def test_rows_do_not_depend_on_other_rows(dtype, weight):
    """To the last bit."""
    spec = ExpertsSpec(5, 2, 96, "swiglu_clamped")
    layer = make_layer(spec, 160, weight)
    x = torch.randn(80, 160, device=DEVICE).to(dtype)
    router = random_dense(5, 160)
    whole = check(spec, layer, router, None, x, dtype, batch_invariant=True)
    for rows in (slice(0, 1), slice(3, 20), slice(40, 80)):
        part = check(spec, layer, router, None, x[rows], dtype, batch_invariant=True)
        assert torch.equal(part, whole[rows])
