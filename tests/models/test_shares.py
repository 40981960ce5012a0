"""Models cut over the ranks of a mesh compute what one rank does, however they are cut."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny_gpt_oss
import torch
from gguf import GGMLQuantizationType
from gguf_files import write_gguf
from meshes import on_ranks
from paged import PagedSequences
from safetensors.torch import load_file, save_file
from tiny import load, make_reference

from ruvon.errors import ConfigError, LoadError
from ruvon.kernels.mesh import Mesh, Product
from ruvon.kernels.ops import Ops
from ruvon.models import Model
from ruvon.models.layers import Mixture, RMSNorm, norm_mixture
from ruvon.models.shares import heads_of, share_of
from ruvon.models.spec import ModelSpec

WIDE = {"vocab_size": 150, "intermediate_size": 160, "moe_intermediate_size": 160, "n_inner": 160}
"""Five units of 32, which two, three and four ranks share unequally; the last of the vocabulary is
not whole."""

GRIDS = ((2, 1), (3, 1), (4, 1), (2, 2))  # ranks of a stage, stages
FAMILIES = (
    "gpt2", "gpt2-untied", "llama-tied", "llama-biased", "mistral", "qwen2-window", "qwen3",
    "gemma3", "qwen3-moe",
)  # fmt: skip
QUANTIZED = ("qwen3 int8", "qwen3 int4", "gpt2 Q4_1", "llama2 Q8_0", "qwen3-moe Q8_0")
"""At load, where heads are whole groups of 32 columns; in GGUF files, where heads cut groups."""
MXFP4 = ("gpt-oss", "gpt-oss original", "gpt-oss GGUF")
ARCHITECTURES = {"gpt2": "gpt2", "llama2": "llama", "qwen3-moe": "qwen3moe"}


@pytest.fixture(scope="module", params=[*FAMILIES, *QUANTIZED, *MXFP4])
def checkpoint(request, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Where it lies, and the settings that it is loaded with."""
    torch.set_num_threads(1)
    name, _, form = request.param.partition(" ")
    folder = tmp_path_factory.mktemp(name)
    file = folder / "tiny.gguf"
    if form == "GGUF":
        tiny_gpt_oss.save_gguf(file)
        return file, {}
    if name == "gpt-oss":
        tiny_gpt_oss.save_gpt_oss(folder)
        return folder / form, {}
    reference = make_reference(name, **WIDE)
    if form.startswith("Q"):
        write_gguf(file, reference, ARCHITECTURES[name], GGMLQuantizationType[form])
        return file, {}
    reference.save_pretrained(folder)
    return folder, {"quantization": form} if form else {}


def tokens(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(150), k=count)


def run(model: Model) -> list[torch.Tensor]:
    """Log-probabilities of chunks, decodes and a ragged batch."""
    paged, prompts = PagedSequences(model), {n: tokens(40, n) for n in range(3)}
    steps = (
        paged.step({0: prompts[0][:17]}),
        paged.step({0: prompts[0][17:18], 1: prompts[1][:9]}),
        paged.step(
            {1: prompts[1][9:20], 2: prompts[2][:30], 0: prompts[0][18:19]}, every_row=False
        ),
        paged.step({0: prompts[0][19:20], 2: prompts[2][30:31]}),
    )
    return [step.log_softmax(-1) for step in steps]


@pytest.fixture(scope="module")
def expected(checkpoint: tuple[Path, dict[str, str]]) -> list[torch.Tensor]:
    """What one rank computes."""
    path, settings = checkpoint
    return run(load(path, **settings))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_ranks_compute_what_one_does(
    checkpoint: tuple[Path, dict[str, str]], expected: list[torch.Tensor], grid: tuple[int, int]
) -> None:
    path, settings = checkpoint
    if "gpt-oss" in str(path) and grid == (4, 1):
        pytest.skip("an expert of 96 columns is cut in three at most")

    def work(mesh: Mesh) -> list[torch.Tensor]:
        found = run(load(path, mesh=mesh, **settings))
        return found if mesh.is_last else []

    last = on_ranks(*grid, work)[-grid[0] :]
    for found in last:
        for step, one, first in zip(found, expected, last[0], strict=True):
            torch.testing.assert_close(step, one, atol=1e-5, rtol=0)
            assert torch.equal(step.argmax(-1), one.argmax(-1))
            assert torch.equal(step, first), "ranks differ"


@pytest.mark.parametrize("name", ["llama-biased", "gpt2", "gemma3", "gpt-oss"])
def test_products_that_ranks_add_up_may_be_made_in_parts(name: str, tmp_path: Path) -> None:
    if name == "gpt-oss":
        tiny_gpt_oss.save_gpt_oss(tmp_path)
    else:
        make_reference(name, **WIDE).save_pretrained(tmp_path)
    expected, parts = run(load(tmp_path)), []

    def in_parts(product: Product, x: torch.Tensor, width: int) -> torch.Tensor:
        y, half = x.new_empty(len(x), width), len(x) // 2
        parts.extend(product(x[rows], y[rows]) for rows in (slice(half), slice(half, None)))
        return y

    def work(mesh: Mesh) -> list[torch.Tensor]:
        return run(load(tmp_path, mesh=replace(mesh, multiply=in_parts)))

    for found in on_ranks(2, 1, work):
        for step, one in zip(found, expected, strict=True):
            torch.testing.assert_close(step, one, atol=1e-5, rtol=0)
    assert parts


def test_few_tokens_of_ranks_are_normed_with_their_choice() -> None:
    ops = SimpleNamespace(
        norm_experts=lambda x, *_: (x + 1, x), experts=lambda x, *_: x + 2, norm_experts_rows=2
    )
    mesh = Mesh(size=2, reduce=lambda x: 10 * x, add_norm=lambda x, *_: (100 * x, x))
    norm = RMSNorm(cast("Ops", ops), torch.ones(3), 1e-5, mesh)
    mixture = Mixture(cast("Ops", ops), *(cast("Any", None),) * 3)
    few, many = torch.ones(2, 3), torch.ones(3, 3)
    assert norm_mixture(norm, mixture, few, None)[0].unique().tolist() == [11]
    assert norm_mixture(norm, mixture, many, None)[0].unique().tolist() == [102]


def spec_of(**sizes: int) -> ModelSpec:
    usual = {"num_heads": 25, "num_kv_heads": 25, "intermediate_size": 6400, "vocab_size": 50257}
    return cast("ModelSpec", SimpleNamespace(num_layers=48, **usual | sizes))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 25])
def test_everything_is_somebodys_once(size: int) -> None:
    shares = [share_of(spec_of(), Mesh(rank=rank, size=size)) for rank in range(size)]
    for whole, parts in (
        (25, [share.heads for share in shares]),
        (6400, [share.width for share in shares]),
        (50257, [share.vocabulary for share in shares]),
    ):
        assert [*chain.from_iterable(parts)] == [*range(whole)]
        assert all(parts)
        assert max(map(len, parts)) - min(map(len, parts)) < 2 * 32  # the last unit is not whole
    assert shares[0].vocabulary_widths == tuple(len(share.vocabulary) for share in shares)


@pytest.mark.parametrize("size", range(1, 13))
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (14, 2), (12, 3), (12, 1)])
def test_queries_are_where_their_keys_are(heads: int, kv_heads: int, size: int) -> None:
    group, seen = heads // kv_heads, []
    for rank in range(size):
        queries, keys = heads_of(heads, kv_heads, rank, size)
        seen += [*queries]
        assert {query // group for query in queries} == set(keys)
        assert len(queries) % len(keys) == 0
    assert seen == [*range(heads)]


def test_layers_are_shared_out_in_order() -> None:
    stages = [share_of(spec_of(), Mesh(stage=stage, stages=5)).layers for stage in range(5)]
    assert [*map(len, stages)] == [10, 10, 10, 9, 9]
    assert [*chain.from_iterable(stages)] == [*range(48)]


@pytest.mark.parametrize(
    ("mesh", "sizes", "message"),
    [
        (Mesh(size=26), {}, "--tensor-parallel-size 26: .* for 1 to 25"),
        (Mesh(size=4), {"intermediate_size": 96}, "--tensor-parallel-size 4: .* for 1 to 3"),
        (Mesh(stages=49), {}, "--pipeline-parallel-size 49: a model of 48 layers"),
    ],
)
def test_more_ranks_than_parts_are_refused(mesh: Mesh, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        share_of(spec_of(**sizes), mesh)


def test_a_stage_leaves_no_stranger_unnoticed(tmp_path: Path) -> None:
    """What another stage asks for is its own; what nobody does is refused."""
    make_reference("llama-tied", **WIDE).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.0.mlp.third.weight": torch.zeros(1)}, file)
    with pytest.raises(LoadError, match=r"no use for model\.layers\.0\.mlp\.third"):
        load(tmp_path, mesh=Mesh(stage=1, stages=2))
