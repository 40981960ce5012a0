"""Prompt logprobs on a GPU: what is compiled at start is all that they ever need."""

import json
from pathlib import Path

import pytest
import torch
from compiled import run_compiled
from fakes import TINY_LLAMA

from ruvon.engine.warm_up import SCORED, scoring_plans
from ruvon.kernels.linear import choose_kernel
from ruvon.kernels.ops import Packed
from ruvon.kernels.tiles import batch_invariant_tile

LLAMA = TINY_LLAMA | {"max_position_embeddings": 2048}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 321,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 2048,
    "n_ctx": 2048,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "options"), [(LLAMA, ["8"]), (GPT2, ["1"]), (LLAMA, ["8", "--deterministic"])]
)
def test_serving_needs_no_more_variants_of_kernels(tmp_path, shape, options):
    (tmp_path / "config.json").write_text(json.dumps(shape))
    script = Path(__file__).parent / "kernel_variants.py"
    found = run_compiled(script, str(tmp_path), *options)
    assert found["start"] > 10
    assert not found["more"]


def test_the_plans_score_whole_chunks_of_these_sizes():
    plans = list(scoring_plans(1000, 16))
    assert [plan.num_tokens for plan in plans] == list(SCORED)
    for plan in plans:
        (chunk,), (row,) = plan.chunks, plan.prompt_rows
        assert len(row.targets) == len(chunk.tokens) <= 16 * len(chunk.blocks[0])
        assert not plan.rows
    assert [plan.num_tokens for plan in scoring_plans(40, 16)] == [1, 2, 16, 32, 40]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["dense", "int8", "int4"])
@pytest.mark.parametrize(
    ("n", "k"), [(768, 768), (768, 3072), (2304, 768), (4800, 1600), (1600, 6400), (50257, 1600)]
)
def test_every_number_of_rows_is_multiplied_as_one_of_these(n, k, kind, gated):
    weight = Packed(kind, (n, k), ())

    def choices(rows):
        return (
            choose_kernel(rows, weight, gated, torch.bfloat16),
            choose_kernel(rows, weight, gated, torch.bfloat16, scores=True),
            batch_invariant_tile(rows, weight, gated, torch.bfloat16),
        )

    known = {choices(rows) for rows in SCORED}
    assert {choices(rows) for rows in range(1, 600)} == known
