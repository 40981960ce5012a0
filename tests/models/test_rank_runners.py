"""The plans of one engine, computed by the ranks of a mesh: the same tokens as on one rank, with
chunks, prefix hits, preemption, penalties, logprobs, pooled rows and grammars."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from meshes import on_ranks
from tiny import make_reference

from ruvon.config import EngineConfig
from ruvon.engine.backends import choose_backend
from ruvon.engine.engine import Engine
from ruvon.engine.grammar import Grammars
from ruvon.engine.kv_cache import plan_memory
from ruvon.engine.runners import make_runner
from ruvon.engine.types import Job, Plan, SamplingParams, StepResult
from ruvon.grammars import regex
from ruvon.kernels.mesh import ALONE, Mesh
from ruvon.models import load_model
from ruvon.models.checkpoint import open_checkpoint
from ruvon.telemetry import silent

BLOCKS, PAGE, LONGEST, VOCAB = 8, 16, 96, 150
SHARED = tuple(random.Random(0).choices(range(2, VOCAB), k=33))
SAMPLINGS = (
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.9, seed=3),
    SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=1.0),
    SamplingParams(temperature=0, prompt_logprobs=1),
    SamplingParams(temperature=1, grammar=regex("([A-E]FGH)*"), seed=4),
    SamplingParams(temperature=0, grammar=regex("[A-F]{9}(BCD)?"), logprobs=1),
)
JOBS = [
    Job(SHARED[: 33 - 7 * (i % 2)] + tuple(range(2, 3 + i)), replace(sampling, max_tokens=36))
    for i, sampling in enumerate(SAMPLINGS)
]
JOBS += [Job(SHARED, SamplingParams(max_tokens=0), pooling=pooling) for pooling in ("mean", "last")]


class Letters:
    """One character a token: 1 ends, then ``A`` and up."""

    vocab_size, bos_id, special_ids = VOCAB, None, frozenset({0, 1})

    def token_bytes(self, id):
        return bytes([63 + id]) if id > 1 else b""

    def encode(self, text, *, add_special_tokens):
        return [ord(char) - 63 for char in text]


@pytest.fixture(scope="module")
def grammars():
    made = Grammars(Letters(), VOCAB, (1,))
    yield made
    made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("qwen3")
    make_reference("qwen3", vocab_size=VOCAB, intermediate_size=160).save_pretrained(path)
    return path


def runner_of(folder, kernels, grammars, mesh):
    """This rank's runner, and a call that lets go of its threads."""
    config = EngineConfig(
        model=str(folder), kernels=kernels, device="cpu", dtype="float32", block_size=PAGE,
        max_num_seqs=4, max_num_batched_tokens=24, kv_cache_memory="1MiB", max_model_len=LONGEST,
        pin_threads="off",
    )  # fmt: skip
    checkpoint = open_checkpoint(config, silent)
    backend = choose_backend(checkpoint.spec, config, torch.device("cpu"), 1, mesh)
    model = load_model(checkpoint, config, backend.ops, silent, 1, backend.mesh)
    memory = plan_memory(
        model.spec, config, backend.kv, weight_bytes=0, free_bytes=0, held=model.held
    )
    memory = replace(memory, num_blocks=BLOCKS)
    runner = make_runner(model, config, memory, backend, grammars, silent)

    def close():
        runner.close()
        backend.close()

    return runner, close, config


def drive(folder, kernels, grammars, depth) -> list[tuple[Plan, StepResult]]:
    """All plans of an engine on one rank, each with its result."""
    runner, close, config = runner_of(folder, kernels, grammars, ALONE)
    runner.depth = depth
    engine = Engine(
        runner, config, max_model_len=LONGEST, num_blocks=BLOCKS, windows=(0,), vocab_size=VOCAB,
        eos_token_ids=(1,), grammars=grammars,
    )  # fmt: skip
    done, pending = [], deque()
    for number, job in enumerate(JOBS):
        engine.add(engine.prepare(job), 0.0, number)
    while engine.has_work:
        while (step := engine.launch(0.0)) is not None:
            pending.append(step)
        step = pending.popleft()
        done.append((step.plan, step.future.result()))
        assert not any(emission.error for emission in engine.collect(step))
    counters = engine._scheduler.counters
    assert counters.preempted
    assert counters.cached
    close()
    return done


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
@pytest.mark.parametrize(("size", "stages"), [(2, 1), (3, 1), (1, 2), (2, 2)])
def test_ranks_sample_the_same_tokens(folder, grammars, kernels, size, stages) -> None:
    steps = drive(folder, kernels, grammars, depth=2 if stages == 1 else 1)

    def work(mesh: Mesh) -> list[StepResult]:
        runner, close, _ = runner_of(folder, kernels, grammars, mesh)
        futures = [runner.launch(plan) for plan, _ in steps]
        results = [future.result(60) for future in futures]
        close()
        return results

    results = on_ranks(size, stages, work)
    for number, found in enumerate(results):
        for (_, one), step in zip(steps, found, strict=True):
            if number < size * (stages - 1):
                assert not any(step.tokens)
                continue
            assert step.tokens == one.tokens
            assert step.errors == one.errors
            assert_near(step, one)


def assert_near(step: StepResult, one: StepResult) -> None:
    assert step.pooled.keys() == one.pooled.keys()
    for seq_id, sums_C in one.pooled.items():
        np.testing.assert_allclose(step.pooled[seq_id], sums_C, atol=1e-3)
    scored = [*one.prompt_logprobs]
    pairs = [
        *zip(step.logprobs, one.logprobs, strict=True),
        *((step.prompt_logprobs[n], one.prompt_logprobs[n]) for n in scored),
    ]
    for got, want in pairs:
        for mine, theirs in zip(got or (), want or (), strict=True):
            assert mine.token == theirs.token
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)
