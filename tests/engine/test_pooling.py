"""Hidden states of a prompt, whatever the steps in which it is computed."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import FakeRunner, fake_hidden

from ruvon.config import EngineConfig
from ruvon.engine.batch import ints
from ruvon.engine.engine import Engine
from ruvon.engine.pooling import places
from ruvon.engine.types import Emission, Job, PooledRows, SamplingParams
from ruvon.errors import RequestError

SCORED = SamplingParams(max_tokens=0)
PROMPT = tuple(range(40, 90))


def make_engine(runner: FakeRunner | None = None, num_blocks: int = 64, **settings) -> Engine:
    config = EngineConfig(block_size=4, **settings)
    return Engine(
        runner or FakeRunner(4), config, max_model_len=128, num_blocks=num_blocks, vocab_size=300
    )


def run(engine: Engine, *jobs: Job) -> dict[int, Emission]:
    """The last emission of every sequence."""
    for number, job in enumerate(jobs):
        engine.add(engine.prepare(job), 0.0, number)
    last = {}
    while engine.has_work:
        for emission in engine.collect(engine.launch(0.0)):
            last[emission.index] = emission
    return last


def mean_of(prompt: tuple[int, ...]) -> np.ndarray:
    return sum(fake_hidden(token, position) for position, token in enumerate(prompt))


@pytest.mark.parametrize("budget", [8, 13, 512])
def test_a_prompt_is_pooled_over_all_its_chunks(budget):
    engine = make_engine(max_num_seqs=4, max_num_batched_tokens=budget)
    pooled = Job(PROMPT, SCORED, pooling="mean")
    chat = Job(PROMPT[:30], SamplingParams(max_tokens=20))
    found = run(engine, pooled, chat, pooled)
    for index in (0, 2):
        np.testing.assert_allclose(found[index].pooled, mean_of(PROMPT), rtol=1e-12)
        assert (found[index].tokens, found[index].finish) == ((), "length")
    assert found[1].pooled is None


def test_the_last_token_alone_may_use_the_prefix_cache():
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=16)
    for num_cached in (0, 48):
        (emission,) = run(engine, Job(PROMPT, SCORED, pooling="last")).values()
        np.testing.assert_array_equal(emission.pooled, fake_hidden(PROMPT[-1], len(PROMPT) - 1))
        assert emission.num_cached == num_cached
    (whole,) = run(engine, Job(PROMPT, SCORED, pooling="mean")).values()
    assert whole.num_cached == 0
    np.testing.assert_allclose(whole.pooled, mean_of(PROMPT), rtol=1e-12)


def test_one_that_is_preempted_begins_anew():
    """The sequences outgrow the cache while the pooled one is on its way."""
    engine = make_engine(
        num_blocks=20, max_num_seqs=8, max_num_batched_tokens=8, scheduling_policy="priority"
    )
    pooled = Job(PROMPT, SCORED, pooling="mean", priority=1)
    others = [Job((n,) * 6, SamplingParams(max_tokens=30, ignore_eos=True)) for n in range(3)]
    engine.add(pooled, 0.0, 9)
    seq = engine.sequence(0)
    last, num_preempted = {}, 0
    assert not engine.collect(engine.launch(0.0))
    for number, job in enumerate(others):
        engine.add(job, 0.0, number)
    while engine.has_work:
        for emission in engine.collect(engine.launch(0.0)):
            last[emission.index] = emission
        num_preempted = max(num_preempted, seq.num_preempted)
    assert num_preempted
    np.testing.assert_allclose(last[9].pooled, mean_of(PROMPT), rtol=1e-12)


def test_what_is_no_number_fails_alone():
    runner = FakeRunner(4)
    runner.errors[0] = "broken"
    found = run(make_engine(runner), *[Job(PROMPT, SCORED, pooling="mean")] * 2)
    assert (found[0].finish, found[0].error) == ("error", "broken")
    np.testing.assert_allclose(found[1].pooled, mean_of(PROMPT), rtol=1e-12)


def test_rows_are_found_among_those_of_a_whole_batch():
    """Of chunks of 3, 5 and 4 tokens: the second's middle, and the last token of the third."""
    rows = [PooledRows(7, 1, 1, 3), PooledRows(8, 2, 3, 1)]
    assert places(rows, ints([0, 3, 8, 12])).tolist() == [4, 5, 6, 11]


def test_pooling_draws_nothing():
    engine = make_engine()
    for sampling in (SamplingParams(), SamplingParams(max_tokens=None)):
        with pytest.raises(RequestError, match="max_tokens 0"):
            engine.add(Job(PROMPT, sampling, pooling="mean"), 0.0)
