"""A real model and sampler draw the same whether or not steps are launched ahead."""

import json
from collections import defaultdict

import pytest
from fakes import TINY_LLAMA

from ruvon.config import EngineConfig
from ruvon.engine.startup import start_engine
from ruvon.engine.types import Job, SamplingParams
from ruvon.telemetry import silent

CONFIG = TINY_LLAMA | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}

SAMPLINGS = (
    {"temperature": 0},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 1},
    {"temperature": 2, "top_k": 9, "top_p": 0.9, "logprobs": 0},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 2, "min_tokens": 12},
    {"temperature": 0, "bad_words": tuple((a, b) for a in range(64) for b in range(a % 3, 64, 3))},
    {"temperature": 1, "logit_bias": {7: 3.0}},
    {"temperature": 1, "allowed_token_ids": (5, 6, 7, 8)},
    {"temperature": 1, "prompt_logprobs": 1},
)


@pytest.fixture
def engine(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    loaded = start_engine(
        EngineConfig(
            str(tmp_path),
            load_format="dummy",
            device="cpu",
            threads=1,
            kernels="torch",
            block_size=4,
            max_num_seqs=6,
            max_num_batched_tokens=16,
            max_model_len=40,
            kv_cache_memory="24KiB",
        ),
        silent,
    )
    yield loaded.engine
    loaded.close()


def run(engine, jobs) -> tuple[dict[int, list[int]], dict[int, list[float]]]:
    """Tokens and their logprobs by completion, with as many steps ahead as the runner takes."""
    tokens, logprobs = defaultdict(list), defaultdict(list)
    pending, first = [], 0
    for job in jobs:
        engine.add(job, 0.0, first)
        first += job.n
    while engine.has_work:
        while (step := engine.launch(0.0)) is not None:
            pending.append(step)
        for emission in engine.collect(pending.pop(0)):
            assert emission.error is None
            tokens[emission.index] += emission.tokens
            scores = [*(emission.prompt_logprobs or [None])[1:], *(emission.logprobs or ())]
            logprobs[emission.index] += [score.logprob for score in scores]
    return tokens, logprobs


def test_the_same_is_drawn_one_step_ahead(engine):
    jobs = [
        Job(
            tuple(range(k, k + 3 + 5 * (k % 3))),
            SamplingParams(**sampling, max_tokens=20, seed=k),
            n=1 + k % 2,
        )
        for k, sampling in enumerate(SAMPLINGS)
    ]
    engine._runner.depth = 1
    tokens, logprobs = run(engine, jobs)
    assert {len(drawn) == 20 for drawn in tokens.values()} == {True, False}
    engine.reset_prefix_cache()
    engine._runner.depth = 2
    tokens_ahead, logprobs_ahead = run(engine, jobs)
    assert tokens_ahead == tokens
    for index, scores in logprobs.items():
        assert logprobs_ahead[index] == pytest.approx(scores, abs=1e-4)
    assert any(logprobs.values())
    assert engine._scheduler.counters.preempted
