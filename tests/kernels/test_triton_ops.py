"""Every Triton operation against its plain torch meaning: compiled where there is a GPU, in
Triton's interpreter (float32 only) where there is none."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from compiled import run_compiled

from ruvon.kernels import decode, reference, split_k
from ruvon.kernels.matmul import Tile, matmul
from ruvon.kernels.ops import AttentionSpec, Dense, ForwardBatch, Packed, PagedIndex, Rope
from ruvon.kernels.pdl import supports_pdl
from ruvon.kernels.triton_ops import make_triton_ops

pytestmark = pytest.mark.usefixtures("triton_device", "seeded")

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_close(actual, expected, dtype):
    """Relative to the size of the whole, so that one small value cannot fail a sum of large."""
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    assert torch.isfinite(actual).all()
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-9)
    assert error < TOLERANCES[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize("columns", [1, 48, 576, 1600])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("centered", [False, True])
def test_norms(ops, dtype, columns, residual, centered):
    x, weight, bias = randn(5, columns, dtype=dtype), randn(columns), randn(columns)
    other = randn(5, columns, dtype=dtype) if residual else None
    if centered and columns == 1:
        pytest.skip("a single centred column is its bias")
    if centered:
        normed, total = ops.layer_norm(x, other, weight, bias, 1e-5)
        expected = reference.layer_norm(x, other, weight, bias, 1e-5)
    else:
        normed, total = ops.rms_norm(x, other, weight, 1e-6)
        expected = reference.rms_norm(x, other, weight, 1e-6)
    assert_close(normed, expected[0], dtype)
    assert_close(total, expected[1], dtype)


def test_small_moves(ops, dtype):
    table = ops.pack(Dense(randn(37, 72)))
    ids = torch.tensor([0, 36, 5, 5], dtype=torch.int32, device=DEVICE)
    x = ops.embed(ids, table)
    assert torch.equal(x, reference.embed(ids, table))
    assert torch.equal(ops.embed(ids + 3, table, 3), x)
    assert torch.equal(ops.embed(ids, table, 5), reference.embed(ids, table, 5))
    assert torch.equal(ops.gather_rows(x, ids[2:] - 3), x[ids[2:].long() - 3])
    assert torch.equal(ops.add(x, x), x + x)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 17, 40, 65] if GPU else [1, 2, 9, 70])
@pytest.mark.parametrize(("n", "k"), [(24, 48), (70, 130), (130, 576)])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "silu_gated", "gelu_tanh_gated"])
def test_linear(ops, dtype, rows, n, k, activation):
    x, bias = randn(rows, k, dtype=dtype), randn(n, dtype=dtype)
    weight = ops.pack(Dense(randn(n, k) * k**-0.5))
    actual = ops.linear(x, weight, bias, activation)
    wide = ops.pack(Dense(weight.tensors[0]))
    wide = replace(wide, tensors=(weight.tensors[0].float(),))
    expected = reference.linear(x.float(), wide, bias.float(), activation)
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize("biased", [True, False])
def test_a_product_in_a_place_of_its_own(ops, dtype, biased):
    x, bias = randn(70, 96, dtype=dtype), randn(48, dtype=dtype) if biased else None
    weight, whole = ops.pack(Dense(randn(48, 96) * 0.1)), randn(150, 48, dtype=dtype)
    y, around = whole[70:140], whole.clone()
    assert ops.linear_into(x, weight, bias, y) is y
    assert_close(y, reference.linear_into(x, weight, bias, torch.empty_like(y)), dtype)
    around[70:140] = y
    assert torch.equal(whole, around)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_other_activations(ops, dtype, activation):
    for rows in (1, 20, 70):
        x, weight = randn(rows, 32, dtype=dtype), ops.pack(Dense(randn(48, 32)))
        expected = reference.linear(x, weight, None, activation)
        assert_close(ops.linear(x, weight, None, activation), expected, dtype)


def test_linear_with_rows_too_long_for_registers(ops, dtype):
    x = randn(2, 8200, dtype=dtype)
    weight = ops.pack(Dense(randn(20, 8200) * 0.01))
    expected = reference.linear(x, weight, None, "none")
    assert_close(ops.linear(x, weight, None, "none"), expected, dtype)


@pytest.mark.parametrize("rows", [1, 6, 40, 70])
def test_logits_are_float32(ops, dtype, rows):
    x, head = randn(rows, 96, dtype=dtype), ops.pack(Dense(randn(301, 96)))
    actual = ops.logits(x, head)
    assert actual.dtype == torch.float32
    expected = x.float() @ head.tensors[0].float().T
    assert_close(actual, expected, torch.float32 if dtype == torch.float32 else torch.float16)


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_inside_a_product(ops, dtype, rows, centered, residual):
    x, gain, shift = randn(rows, 200, dtype=dtype), randn(200), randn(200)
    other = randn(rows, 200, dtype=dtype) if residual else None
    weight, bias = ops.pack(Dense(randn(60, 200) * 0.1)), randn(60, dtype=dtype)
    norm_bias = shift if centered else None
    actual, total = ops.norm_linear(x, other, gain, norm_bias, 1e-5, weight, bias, "silu_gated")
    if centered:
        normed, expected_total = reference.layer_norm(x, other, gain, shift, 1e-5)
    else:
        normed, expected_total = reference.rms_norm(x, other, gain, 1e-5)
    assert_close(actual, reference.linear(normed, weight, bias, "silu_gated"), dtype)
    assert_close(total, expected_total, dtype)


# ------------------------------------------------------------------------------------- attention


def make_batch(queries, contexts, page, padding=0, num_blocks=None):
    """A ragged batch whose sequences own shuffled blocks; ``padding`` empty sequences follow."""
    needed = [-(-context // page) for context in contexts]
    order = torch.randperm(num_blocks or sum(needed) + 1).tolist()
    tables = torch.zeros(len(contexts) + padding, max(needed), dtype=torch.int32)
    slots, positions, starts = [], [], [0]
    for s, (query, context) in enumerate(zip(queries, contexts, strict=True)):
        own = [order.pop() for _ in range(needed[s])]
        tables[s, : needed[s]] = torch.tensor(own)
        at = range(context - query, context)
        positions += at
        slots += [own[p // page] * page + p % page for p in at]
        starts.append(starts[-1] + query)
    starts += [starts[-1]] * padding
    positions += [0] * padding
    slots += [-1] * padding

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    return ForwardBatch(
        token_ids=ints([0] * len(positions)),
        positions=ints(positions),
        paged=(PagedIndex(ints(slots), tables.to(DEVICE)),),
        query_starts=ints(starts),
        context_lens=ints(list(contexts) + [0] * padding),
        logit_rows=ints([0]),
        max_query=max(queries),
        max_context=max(contexts),
    )


def make_cache(batch, page, groups, dim, dtype):
    (index,) = batch.paged
    blocks = int(index.block_tables.max()) + 2
    blocks = max(blocks, int(index.slots.max()) // page + 1)
    return randn(blocks, groups, page, dim, dtype=dtype), randn(
        blocks, groups, page, dim, dtype=dtype
    )


SHAPES = [  # heads, groups, head size, page
    (1, 1, 32, 16),
    (3, 3, 64, 16),
    (9, 3, 64, 16),
    (16, 2, 64, 64),
    (4, 2, 80, 16),
    (5, 1, 128, 64),
    (2, 2, 256, 16),
]
MANY = 130  # queries of one sequence: more than two tiles of them
MASKS = [(window, sinks) for window in (0, 20) for sinks in (False, True)]
if not GPU:  # the interpreter is slow
    SHAPES = [SHAPES[i] for i in (0, 2, 4)]
    MANY = 70
    MASKS = [(0, False), (20, True)]
CASES = [  # queries and contexts of each sequence
    ((1, 1, 1), (1, 17, 300)),
    ((1,), (700,)),
    ((5, 1, MANY, 1), (5, 40, MANY + 20, 1)),
    ((33, 1), (200, 3)),
]


@pytest.mark.parametrize(("heads", "groups", "dim", "page"), SHAPES)
@pytest.mark.parametrize(("queries", "contexts"), CASES)
@pytest.mark.parametrize(("window", "sinks"), MASKS)
def test_attention(ops, dtype, heads, groups, dim, page, queries, contexts, window, sinks):
    batch = make_batch(queries, contexts, page)
    k_cache, v_cache = make_cache(batch, page, groups, dim, dtype)
    spec = AttentionSpec(heads, groups, dim, dim**-0.5, window)
    q = randn(sum(queries), heads, dim, dtype=dtype)
    sinks_H = randn(heads) if sinks else None
    actual = ops.attention(q, k_cache, v_cache, batch, spec, sinks_H)
    expected = reference.attention(q, k_cache, v_cache, batch, spec, sinks_H)
    assert_close(actual, expected, dtype)


BLIND = [  # queries and contexts with windows that have left whole blocks behind
    ((1, 1), (300, 90)),
    ((1,), (700,)),
    ((5, 1, MANY), (70, 40, MANY + 120)),
]


@pytest.mark.parametrize(("heads", "groups", "dim", "page"), SHAPES)
@pytest.mark.parametrize(("queries", "contexts"), BLIND)
@pytest.mark.parametrize("table", ["torch", "triton", "invariant"])
def test_what_has_left_the_window_changes_nothing(
    ops, dtype, heads, groups, dim, page, queries, contexts, table
):
    """Its blocks are somebody else's by now, or block 0 stands for them, whatever is in there."""
    window, batch = 20, make_batch(queries, contexts, page)
    (index,) = batch.paged
    attention = {
        "torch": reference.attention,
        "triton": ops.attention,
        "invariant": make_triton_ops(dtype, DEVICE, batch_invariant=True).attention,
    }[table]
    k_cache, v_cache = make_cache(batch, page, groups, dim, dtype)
    spec = AttentionSpec(heads, groups, dim, dim**-0.5, window)
    q = randn(sum(queries), heads, dim, dtype=dtype)
    expected = attention(q, k_cache, v_cache, batch, spec, None)
    assert_close(expected, reference.attention(q, k_cache, v_cache, batch, spec, None), dtype)
    tables, gone = index.block_tables + 1, []
    for row, query, context in zip(tables, queries, contexts, strict=True):
        num_gone = max(context - query - window + 1, 0) // page
        gone += row[:num_gone].tolist()
        row[:num_gone] = 0
    assert gone
    nowhere = torch.full_like(k_cache[:1], torch.nan)  # block 0
    k_cache, v_cache = torch.cat((nowhere, k_cache)), torch.cat((nowhere, v_cache))
    k_cache[gone], v_cache[gone] = torch.nan, torch.nan
    for its in (tables, index.block_tables + 1):
        blind = replace(batch, paged=(replace(index, block_tables=its),))
        assert torch.equal(attention(q, k_cache, v_cache, blind, spec, None), expected)


def rope_tables(dims):
    angles = torch.rand(1024, dims // 2, device=DEVICE) * 6
    return Rope(angles.cos(), angles.sin())


@pytest.mark.parametrize(("heads", "groups", "dim", "page"), SHAPES)
@pytest.mark.parametrize("rotated", [None, 1.0, 0.5])
@pytest.mark.parametrize("normed", [False, True])
def test_write_kv(ops, dtype, heads, groups, dim, page, rotated, normed):
    batch = make_batch((7, 1), (7, 30), page)
    k_cache, v_cache = make_cache(batch, page, groups, dim, dtype)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    qkv = randn(8, (heads + 2 * groups) * dim, dtype=dtype)
    spec = AttentionSpec(heads, groups, dim, 1.0)
    rope = rope_tables(int(dim * rotated)) if rotated else None
    norms = (randn(dim), randn(dim)) if normed else (None, None)
    q = ops.write_kv(qkv, batch, k_cache, v_cache, spec, rope, *norms, 1e-6)
    expected_q = reference.write_kv(qkv, batch, expected_k, expected_v, spec, rope, *norms, 1e-6)
    assert_close(q, expected_q, dtype)
    assert_close(k_cache, expected_k, dtype)
    assert torch.equal(v_cache, expected_v)


@pytest.mark.parametrize(("heads", "groups", "dim", "page"), SHAPES)
@pytest.mark.parametrize("contexts", [(1, 16, 17, 300), (900,)])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("plain", [False, True])
def test_decode_in_one_launch(ops, dtype, heads, groups, dim, page, contexts, window, plain):
    """`attend` is `write_kv` and `attention`; empty sequences at the end change nothing."""
    batch = make_batch((1,) * len(contexts), contexts, page, padding=2)
    k_cache, v_cache = make_cache(batch, page, groups, dim, dtype)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    tokens = len(contexts) + 2
    qkv = randn(tokens, (heads + 2 * groups) * dim, dtype=dtype)
    spec = AttentionSpec(heads, groups, dim, dim**-0.5, window)
    rope = None if plain else rope_tables(dim)
    norms = (None, None, 0.0) if plain else (randn(dim), randn(dim), 1e-6)
    sinks = None if plain else randn(heads)
    actual = ops.attend(qkv, batch, k_cache, v_cache, spec, rope, *norms, sinks)
    real = slice(0, len(contexts))
    trimmed = replace(
        batch,
        positions=batch.positions[real],
        paged=(PagedIndex(batch.paged[0].slots[real], batch.paged[0].block_tables[real]),),
        query_starts=batch.query_starts[: len(contexts) + 1],
        context_lens=batch.context_lens[real],
    )
    q = reference.write_kv(qkv[real], trimmed, expected_k, expected_v, spec, rope, *norms)
    expected = reference.attention(q, expected_k, expected_v, trimmed, spec, sinks)
    assert_close(actual[real], expected, dtype)
    assert_close(k_cache, expected_k, dtype)
    assert torch.equal(v_cache, expected_v)


@pytest.mark.parametrize(("programs", "dim"), [(500, 64), (700, 64), (2000, 64), (500, 128)])
def test_decode_as_for_many_sequences(ops, dtype, monkeypatch, programs, dim):
    """With the tiles that so many programs would have."""
    tile = decode.decode_tile(3, dim, programs)
    monkeypatch.setattr(decode, "decode_tile", lambda *shape: tile)
    for window in (0, 20):
        test_decode_in_one_launch(ops, dtype, 6, 2, dim, 16, (1, 16, 17, 300), window, False)


def test_the_workspace_holds_any_split():
    space = decode.make_workspace(torch.device("cpu"))
    for sequences in (1, 2, 3, 7, 64, 200):
        for groups in (1, 2, 3, 8, 12, 25, 64):
            splits = decode.num_splits(sequences, groups, 1 << 20)
            assert splits == 1 or sequences * groups * splits <= decode.PROGRAMS
            if splits > 1:
                assert sequences * groups <= space.counters.numel()


# --------------------------------------------------------------------------------- batch-invariant


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="numpy, in the interpreter, adds as it likes")
@pytest.mark.parametrize("activation", ["none", "silu_gated"])
def test_rows_do_not_depend_on_other_rows(dtype, activation):
    """To the last bit: alone, among few, among many, and at another place."""
    ops = make_triton_ops(dtype, DEVICE, batch_invariant=True)
    x = randn(150, 320, dtype=dtype)
    weight, bias = ops.pack(Dense(randn(192, 320) * 0.05)), randn(192, dtype=dtype)
    head = ops.pack(Dense(randn(333, 320)))
    many, many_logits = ops.linear(x, weight, bias, activation), ops.logits(x, head)
    for rows in (slice(0, 1), slice(3, 20), slice(60, 130)):
        assert torch.equal(ops.linear(x[rows], weight, bias, activation), many[rows])
        assert torch.equal(ops.logits(x[rows], head), many_logits[rows])


HEADS = ((6, 2, 64), (3, 3, 64), (4, 1, 80), (6, 6, 96), (4, 2, 128), (2, 1, 256))
CUTS = ((0, 129, 130), (0, 1, 63, 64, 130), (0, 50, 100, 130))
if not GPU:  # the interpreter is slow
    HEADS, CUTS = HEADS[2:3], CUTS[1:2]

PRODUCTS = (  # outputs and columns of GPT-2's products, 124M and XL, and of heads of many sizes
    (2304, 768), (768, 768), (3072, 768), (768, 3072), (50257, 768), (4800, 1600), (1600, 6400),
    (80, 1920), (960, 576), (336, 160),
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="numpy, in the interpreter, adds as it likes")
@pytest.mark.parametrize(("outputs", "columns"), PRODUCTS)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 33, 64, 65, 129])
def test_no_product_depends_on_its_number_of_rows(outputs, columns, rows):
    ops = make_triton_ops(torch.bfloat16, DEVICE, batch_invariant=True)
    x = randn(300, columns, dtype=torch.bfloat16)
    weight = ops.pack(Dense(randn(outputs, columns) * 0.05))
    bias = randn(outputs, dtype=torch.bfloat16)
    for product in (lambda x: ops.linear(x, weight, bias, "none"), lambda x: ops.logits(x, weight)):
        assert torch.equal(product(x[7 : 7 + rows]), product(x)[7 : 7 + rows])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="numpy, in the interpreter, adds as it likes")
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("columns", [160, 576, 768, 1600, 2880])
def test_no_norm_depends_on_its_number_of_rows(norm, columns):
    ops = make_triton_ops(torch.bfloat16, DEVICE, batch_invariant=True)
    x, residual = (randn(100, columns, dtype=torch.bfloat16) for _ in range(2))
    weights = [randn(columns) for _ in range(1 if norm == "rms_norm" else 2)]
    many = getattr(ops, norm)(x, residual, *weights, 1e-5)
    few = getattr(ops, norm)(x[9:12], residual[9:12], *weights, 1e-5)
    assert all(torch.equal(a, b[9:12]) for a, b in zip(few, many, strict=True))


@pytest.mark.parametrize(("heads", "groups", "size"), HEADS)  # of queries, of keys
@pytest.mark.parametrize("window", [0, 20])
def test_attention_does_not_depend_on_other_sequences_nor_on_chunks(
    dtype, window, heads, groups, size
):
    """To the last bit on a GPU. In the interpreter numpy adds as it likes."""
    ops = make_triton_ops(dtype, DEVICE, batch_invariant=True)
    batch = make_batch((1, 130, 40), (700, 150, 90), 16)
    k_cache, v_cache = make_cache(batch, 16, groups, size, dtype)
    spec = AttentionSpec(heads, groups, size, size**-0.5, window)
    q = randn(171, heads, size, dtype=dtype)
    together = ops.attention(q, k_cache, v_cache, batch, spec, None)
    assert_close(together, reference.attention(q, k_cache, v_cache, batch, spec, None), dtype)
    whole = together[1:131]  # of 130 queries at the end of 150 tokens, cut anywhere:
    for cuts in CUTS:
        for first, end in pairwise(cuts):
            chunk = replace(
                batch,
                paged=(replace(batch.paged[0], block_tables=batch.paged[0].block_tables[1:2]),),
                query_starts=torch.tensor([0, end - first], dtype=torch.int32, device=DEVICE),
                context_lens=batch.context_lens[1:2] - 130 + end,
                max_query=end - first,
            )
            part = ops.attention(q[1 + first : 1 + end], k_cache, v_cache, chunk, spec, None)
            assert_close(part, whole[first:end], dtype)
            assert torch.equal(part, whole[first:end]) or not GPU, (first, end)


@pytest.mark.slow
def test_masked_keys_are_computed_with_as_others_are():
    """What a prompt's cuts change on a GPU is which keys go through the loop that masks."""
    unmasked, masked = run_compiled(Path(__file__).parent / "prefill_arithmetic.py")
    assert unmasked
    assert unmasked == masked


@pytest.mark.parametrize("activation", ["none", "gelu", "silu_gated"])
def test_invariant_products_are_right(dtype, activation):
    ops = make_triton_ops(dtype, DEVICE, batch_invariant=True)
    weight, bias = ops.pack(Dense(randn(192, 320) * 0.05)), randn(192, dtype=dtype)
    for rows in (3, 70):
        x = randn(rows, 320, dtype=dtype)
        expected = reference.linear(x, weight, bias, activation)
        assert_close(ops.linear(x, weight, bias, activation), expected, dtype)


@pytest.mark.parametrize(
    ("rows", "outputs", "columns", "tile"),
    [
        (5, 100, 96, Tile(16, 64, 64, 3)),
        (13, 70, 200, Tile(16, 64, 64, 3, split_k=3)),
        (50, 70, 200, Tile(64, 32, 64, 3, swap=False, ahead=512)),
        (50, 70, 130, Tile(16, 32, 64, 3)),
    ],
)
@pytest.mark.parametrize("activation", ["relu", "silu_gated"])
def test_streamed_product(dtype, rows, outputs, columns, tile, activation):
    """Rows, outputs and columns that fill no tile; the second splits its sums, the last's columns
    cannot be copied in bulk."""
    if activation == "silu_gated":
        tile = tile._replace(split_k=1)
    x, weight = randn(rows, columns, dtype=dtype), randn(outputs, columns, dtype=dtype)
    bias, sums = randn(outputs, dtype=dtype), split_k.make_workspace(DEVICE)
    packed = Packed("dense", (outputs, columns), (weight,))
    actual = matmul(x, packed, bias, activation, dtype, sums, supports_pdl(DEVICE), tile)
    wide = replace(packed, tensors=(weight.double(),))
    assert_close(actual, reference.linear(x.double(), wide, bias.double(), activation), dtype)
    assert not sums.counters.any(), "they are zero between uses"
