"""A real model and sampler draw the same whether or not steps are launched ahead."""

import json
from collections import defaultdict

import pytest
from fakes import TINY_LLAMA, emissions_of

from ruvon.config import EngineConfig
from ruvon.engine.startup import start_engine
from ruvon.engine.types import Job, SamplingParams
from ruvon.models.decoder import Decoder
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


class Failures:
    """Which of the next calls of a model raise."""

    def __init__(self):
        self.calls, self.failing = 0, ()

    def __call__(self, forward, *arguments, **named):
        self.calls += 1
        if self.calls in self.failing:
            raise ArithmeticError(f"call {self.calls}")
        return forward(*arguments, **named)


@pytest.fixture
def failures(monkeypatch):
    failures, forward = Failures(), Decoder.forward
    monkeypatch.setattr(Decoder, "forward", lambda *a, **named: failures(forward, *a, **named))
    return failures


@pytest.fixture
def engine(tmp_path, failures):
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
    first = 0
    for job in jobs:
        engine.add(job, 0.0, first)
        first += job.n
    for emission in emissions_of(engine):
        assert emission.error is None or engine.failure is not None
        tokens[emission.index] += emission.tokens
        scores = [*(emission.prompt_logprobs or [None])[1:], *(emission.logprobs or ())]
        logprobs[emission.index] += [score.logprob for score in scores]
    return tokens, logprobs


JOBS = [
    Job(
        tuple(range(k, k + 3 + 5 * (k % 3))),
        SamplingParams(**sampling, max_tokens=20, seed=k),
        n=1 + k % 2,
    )
    for k, sampling in enumerate(SAMPLINGS)
]


def test_the_same_is_drawn_one_step_ahead(engine):
    engine._runner.depth = 1
    tokens, logprobs = run(engine, JOBS)
    assert {len(drawn) == 20 for drawn in tokens.values()} == {True, False}
    engine.reset_prefix_cache()
    engine._runner.depth = 2
    tokens_ahead, logprobs_ahead = run(engine, JOBS)
    assert tokens_ahead == tokens
    for index, scores in logprobs.items():
        assert logprobs_ahead[index] == pytest.approx(scores, abs=1e-4)
    assert any(logprobs.values())
    assert engine._scheduler.counters.preempted


def test_steps_that_fail_cost_nobody_else_a_token(engine, failures):
    tokens, _ = run(engine, JOBS)
    engine.reset_prefix_cache()
    failures.failing = {failures.calls + number for number in (2, 5, 6, 20)}
    with_failures, _ = run(engine, JOBS)
    unhurt = [index for index in tokens if with_failures[index] == tokens[index]]
    assert 0 < len(unhurt) < len(tokens)
    for index, drawn in with_failures.items():
        assert drawn == tokens[index][: len(drawn)]
    assert run(engine, JOBS)[0] == tokens  # over the prefixes that the others have left
