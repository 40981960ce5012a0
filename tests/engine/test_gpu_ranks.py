"""Models on two GPUs against one: engines whose ranks are processes, and all families."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import DEVICE, on_cards
from fakes import TINY_LLAMA, emissions_of
from test_gpu_families import build, mixed_steps, over_cache, run

from ruvon.config import EngineConfig
from ruvon.engine.startup import LoadedEngine, start_engine
from ruvon.engine.types import Job, SamplingParams
from ruvon.grammars import regex
from ruvon.kernels.memory_mesh import over_memory
from ruvon.kernels.mesh import Mesh, Store
from ruvon.kernels.triton_ops import make_triton_ops
from ruvon.telemetry import silent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(300),
]

SAMPLINGS = (
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=0, prompt_logprobs=1),
    SamplingParams(temperature=0, grammar=regex("[a-f]{9}x+")),
    SamplingParams(temperature=0.8, top_p=0.9, seed=3, logprobs=1),
    SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=1.0, logprobs=1),
    SamplingParams(temperature=0.9, typical_p=0.5, seed=1),
)
SHARED = tuple(range(3, 40))
JOBS = [
    Job((*SHARED[: 20 + i], i), replace(sampling, max_tokens=30))
    for i, sampling in enumerate(SAMPLINGS * 2)
]


def config_of(folder: Path, **more: Any) -> EngineConfig:
    """So little cache that sequences are preempted, steps that cut prompts into chunks, and a width
    for four ranks."""
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA | {"intermediate_size": 128}))
    settings: dict[str, Any] = {
        "load_format": "dummy", "device": "cuda", "kernels": "triton", "dtype": "float32",
        "max_num_seqs": 8, "max_num_batched_tokens": 48, "max_model_len": 96,
        "kv_cache_memory": "160KiB", "pin_threads": "off",
    }  # fmt: skip
    return EngineConfig(model=str(folder), **settings | more)


def answers(loaded: LoadedEngine, jobs: list[Job]) -> list[list[tuple[int, float | None]]]:
    """Of each job its tokens, with their log-probabilities where they are wanted."""
    engine, made = loaded.engine, {}
    for job in jobs:
        (seq_id,) = engine.add(engine.prepare(job), 0.0)
        made[seq_id] = []
    for emission in emissions_of(engine):
        assert emission.error is None
        scores = emission.logprobs or [None] * len(emission.tokens)
        made[emission.seq_id] += [
            (token, score and score.logprob)
            for token, score in zip(emission.tokens, scores, strict=True)
        ]
    return [*made.values()]


@pytest.mark.parametrize(("ranks", "stages"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_processes_give_the_tokens_of_one(tmp_path, ranks, stages):
    if torch.cuda.device_count() < ranks * stages:
        pytest.skip(f"needs {ranks * stages} GPUs")
    config = config_of(tmp_path)
    alone = start_engine(config, silent)
    expected = answers(alone, JOBS)
    alone.close()
    cut = replace(config, tensor_parallel_size=ranks, pipeline_parallel_size=stages)
    loaded = start_engine(cut, silent)
    found = answers(loaded, JOBS)
    again = answers(loaded, JOBS)
    loaded.close()
    for one, two, three in zip(expected, found, again, strict=True):
        assert [token for token, _ in one] == [token for token, _ in two]
        assert [token for token, _ in two] == [token for token, _ in three]
        for (_, mine), (_, theirs) in zip(one, two, strict=True):
            assert mine == (theirs and pytest.approx(theirs, abs=1e-4))


def test_deterministic_ranks_give_the_same_bits_in_any_company(tmp_path):
    config = config_of(tmp_path, tensor_parallel_size=2, deterministic=True, dtype="bfloat16")
    loaded = start_engine(config, silent)
    together = answers(loaded, JOBS[:6])
    alone = [answers(loaded, [job])[0] for job in JOBS[:6]]
    loaded.close()
    assert together == alone


FAMILIES = ("GPT2LMHeadModel", "GptOssForCausalLM")
"""What differs most; the tokens of Llama are compared above."""


def compute_on_cards(mesh: Mesh, store: Store, expected: dict[str, list[torch.Tensor]]) -> None:
    """One rank's process: logits of every family are those that one GPU computes."""
    mesh = over_memory(mesh, store, DEVICE)
    for family, wanted in expected.items():
        model = build(family, 64, make_triton_ops(torch.float32, DEVICE), mesh=mesh)
        found = run(over_cache(model), mixed_steps(), DEVICE)
        for got, want in zip(found, wanted, strict=True):
            assert (got - want).abs().max() < 1e-3 * want.abs().max(), family
            assert torch.equal(got.argmax(-1), want.argmax(-1)), family


def test_two_ranks_compute_what_one_does(tmp_path):
    ops = make_triton_ops(torch.float32, DEVICE)
    expected = {
        family: run(over_cache(build(family, 64, ops)), mixed_steps(), DEVICE)
        for family in FAMILIES
    }
    on_cards(2, tmp_path, compute_on_cards, expected)
