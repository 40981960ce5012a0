"""Jobs in, emissions out: what is refused, what is resolved, what is counted."""

from __future__ import annotations

import pytest
from fakes import FakeRunner

from ruvon.engine.engine import MOST_FAILURES
from ruvon.engine.types import Job, SamplingParams
from ruvon.errors import ContextLengthError, EngineDeadError, QueueFullError, RequestError


def run(engine):
    """All emissions until the engine is idle, and the statistics of each step."""
    emissions, stats, now = [], [], 0.0
    while engine.has_work:
        pending = engine.launch(now)
        emissions += engine.collect(pending)
        stats.append(engine.stats)
        now += 1.0
    return emissions, stats


def outputs(emissions):
    by_index = {}
    for emission in emissions:
        by_index.setdefault(emission.index, []).extend(emission.tokens)
    return by_index


@pytest.mark.parametrize(
    ("job", "says", "param"),
    [
        (Job(()), "empty", "prompt"),
        (Job((1, 5000, 2)), "5000", "prompt"),
        (Job((1, -3, 2)), "-3", "prompt"),
        (Job((1,), n=0), "n must be from 1 to", "n"),
        (Job((1,), n=5000), "n must be from 1 to", "n"),
        (Job((1,), SamplingParams(max_tokens=-1)), "at least 0", "max_tokens"),
    ],
)
def test_what_can_never_run_is_refused(make_engine, job, says, param):
    engine = make_engine()
    with pytest.raises(RequestError, match=says) as caught:
        engine.add(job, 0.0)
    assert caught.value.param == param
    assert not engine.has_work


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "says"),
    [
        (40, 30, r"you requested 70 tokens \(40 in the prompt, 30 in the completion\)"),
        (64, None, r"your prompt resulted in 64 tokens\. Please reduce the length of the prompt"),
        (65, 0, r"maximum context length is 64 tokens\. However, you requested 65"),
    ],
)
def test_what_does_not_fit_the_context_is_refused(make_engine, num_prompt, max_tokens, says):
    engine = make_engine(max_model_len=64)
    with pytest.raises(ContextLengthError, match=says) as caught:
        engine.add(Job((97,) * num_prompt, SamplingParams(max_tokens=max_tokens)), 0.0)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_errors_about_the_prompt_name_its_field(make_engine):
    engine = make_engine(max_model_len=64)
    for prompt in ((), (97,) * 64, (9999,)):
        with pytest.raises(RequestError) as caught:
            engine.check([Job(prompt, SamplingParams(max_tokens=1), param="messages")])
        assert caught.value.param == "messages"


def test_the_context_is_no_longer_than_the_cache(make_engine):
    engine = make_engine(num_blocks=2, max_model_len=256)
    assert engine.max_model_len == 32
    engine.add(Job((97,) * 2, SamplingParams(max_tokens=30, ignore_eos=True)), 0.0)
    emissions, _ = run(engine)
    assert len(emissions) == 30
    assert emissions[-1].finish == "length"


def test_no_max_tokens_means_the_rest_of_the_context(make_engine):
    engine = make_engine(max_model_len=64)
    engine.add(Job((97,) * 60, SamplingParams(max_tokens=None)), 0.0)
    emissions, _ = run(engine)
    assert [e.finish for e in emissions] == [None, None, None, "length"]


def test_a_full_queue_refuses_the_whole_job(make_engine):
    engine = make_engine(max_num_seqs=2, max_num_queued_reqs=1)
    ids = engine.add(Job((97,)), 0.0) + engine.add(Job((97,)), 0.0)
    with pytest.raises(QueueFullError) as caught:
        engine.add(Job((97,), n=2), 0.0)
    assert caught.value.retry_after
    ids += engine.add(Job((97,)), 0.0)
    engine.abort(ids)
    assert not engine.has_work
    engine.add(Job((97,), n=3), 0.0)


def test_ids_are_never_used_twice(make_engine):
    engine = make_engine()
    ids = engine.add(Job((97,), n=3), 0.0)
    run(engine)
    ids += engine.add(Job((97,), n=3), 0.0)
    assert len(set(ids)) == 6


def test_indices_count_from_where_the_caller_says(make_engine):
    engine = make_engine()
    engine.add(Job((97,), SamplingParams(max_tokens=1), n=2), 0.0, first_index=4)
    emissions, _ = run(engine)
    assert sorted(e.index for e in emissions) == [4, 5]


def test_choices_of_one_seed_differ_and_are_the_same_next_time(make_engine):
    job = Job((97, 98), SamplingParams(max_tokens=12, seed=3), n=3)
    runs = []
    for _ in range(2):
        engine = make_engine()
        engine.add(job, 0.0)
        runs.append(outputs(run(engine)[0]))
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs[0].values()}) == 3
    engine = make_engine()
    engine.add(Job((97, 98), SamplingParams(max_tokens=12, seed=3)), 0.0)
    assert outputs(run(engine)[0])[0] == runs[0][0]


def test_without_a_seed_each_request_draws_its_own(make_engine):
    engine = make_engine()
    ids = [engine.add(Job((97,)), 0.0)[0] for _ in range(8)]
    seeds = {engine.sequence(seq_id).seed for seq_id in ids}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("seed", [-1, 0, 2**64 + 5])
def test_any_integer_is_a_seed(make_engine, seed):
    engine = make_engine()
    (seq_id,) = engine.add(Job((97,), SamplingParams(seed=seed)), 0.0)
    assert 0 <= engine.sequence(seq_id).seed < 2**63


def test_a_fresh_prompt_is_computed_once_for_all_its_choices(make_engine):
    runner = FakeRunner(16)
    engine = make_engine(runner)
    engine.add(Job(tuple(range(97, 97 + 25)) * 2, SamplingParams(max_tokens=1), n=8), 0.0)
    emissions, _ = run(engine)
    assert runner.computed == 50 + 7 * 2
    assert sorted(e.num_cached for e in emissions) == [0] + [48] * 7


def test_times_are_stamped_as_the_caller_tells_them(make_engine):
    engine = make_engine(max_num_batched_tokens=64, max_num_seqs=1)
    first = engine.sequence(engine.add(Job((97,) * 100, SamplingParams(max_tokens=1)), 0.0)[0])
    second = engine.sequence(engine.add(Job((98,), SamplingParams(max_tokens=1)), 0.25)[0])
    run(engine)
    assert (first.arrived_at, first.scheduled_at) == (0.0, 0.0)
    assert (second.arrived_at, second.scheduled_at) == (0.25, 2.0)


def test_statistics_of_each_step(make_engine):
    engine = make_engine(num_blocks=8, max_num_seqs=1)
    engine.add(Job((97,) * 20, SamplingParams(max_tokens=1)), 0.0)
    engine.add(Job((97,) * 20, SamplingParams(max_tokens=1)), 0.0)
    _, (first, second) = run(engine)
    assert (first.num_tokens, second.num_tokens) == (20, 4)
    assert (first.num_running, first.num_waiting) == (0, 1)
    assert (first.num_cached, first.num_queried) == (0, 20)
    assert (second.num_cached, second.num_queried) == (16, 20)
    assert (second.num_free_blocks, second.num_blocks) == (8, 8)
    assert second.step == first.step + 1


def test_the_prefix_cache_can_be_emptied(make_engine):
    runner = FakeRunner(16)
    engine = make_engine(runner)
    for _ in range(2):
        engine.add(Job((97,) * 20, SamplingParams(max_tokens=1)), 0.0)
        run(engine)
        engine.reset_prefix_cache()
    assert runner.computed == 40


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(make_engine):
    runner = FakeRunner(16, depth=2)
    engine = make_engine(runner)
    runner.failing = {2: "run"}
    engine.add(Job((97,)), 0.0)
    steps = [engine.launch(0.0), engine.launch(0.0)]
    assert len(engine.collect(steps[0])) == 1
    (failed,) = engine.collect(steps[1])
    assert (failed.finish, failed.error) == (
        "error", "The step that computed it failed (ArithmeticError)."
    )  # fmt: skip
    assert isinstance(engine.failure, ArithmeticError)
    engine.add(Job((97,), SamplingParams(max_tokens=2, ignore_eos=True)), 0.0)
    assert [emission.finish for emission in run(engine)[0]] == [None, "length"]
    assert engine.failure is engine.dead is None


@pytest.mark.parametrize(("lost", "num_steps"), [(True, 1), (False, MOST_FAILURES)])
def test_an_engine_is_dead_when_its_runner_is_or_fails_all_the_time(make_engine, lost, num_steps):
    runner = FakeRunner(16)
    engine = make_engine(runner)
    runner.broken, runner.lost = RuntimeError("out of order"), lost
    for _ in range(num_steps - 1):
        engine.add(Job((97,)), 0.0)
        (failed,) = engine.collect(engine.launch(0.0))
        assert failed.finish == "error"
    engine.add(Job((97,)), 0.0)
    pending = engine.launch(0.0)
    for _ in range(2):
        with pytest.raises(EngineDeadError, match="RuntimeError") as caught:
            engine.collect(pending)
        assert caught.value.__cause__ is engine.dead is runner.broken
    with pytest.raises(EngineDeadError):
        engine.add(Job((97,)), 0.0)


def test_an_idle_engine_launches_nothing(make_engine):
    assert make_engine().launch(0.0) is None


def test_no_more_is_launched_than_the_runner_takes(make_engine):
    engine = make_engine(FakeRunner(16, depth=2))
    engine.add(Job((97,), SamplingParams(max_tokens=4, ignore_eos=True)), 0.0)
    first, second = engine.launch(0.0), engine.launch(0.0)
    assert engine.launch(0.0) is None
    assert len(engine.collect(first)) == 1
    third = engine.launch(0.0)
    assert [len(engine.collect(step)) for step in (second, third)] == [1, 1]


def test_nothing_is_launched_behind_a_long_step(make_engine):
    engine = make_engine(FakeRunner(16, depth=2, long_step=2))
    engine.add(Job((97,) * 3, SamplingParams(max_tokens=4, ignore_eos=True)), 0.0)
    long = engine.launch(0.0)
    assert engine.launch(0.0) is None
    engine.collect(long)
    short, ahead = engine.launch(0.0), engine.launch(0.0)
    assert [step.plan.num_tokens for step in (short, ahead)] == [1, 1]


def test_statistics_of_steps_that_overlap_are_each_their_own(make_engine):
    engine = make_engine(FakeRunner(16, depth=2), num_blocks=8, max_num_seqs=1)
    for token in (97, 98):
        engine.add(Job((token,) * 20, SamplingParams(max_tokens=1)), 0.0)
    pending, stats = [engine.launch(0.0), engine.launch(0.0)], []
    for step in pending:
        engine.collect(step)
        stats.append(engine.stats)
    assert [(s.step, s.num_tokens, s.num_queried, s.num_cached) for s in stats] == [
        (1, 20, 20, 0),
        (2, 20, 20, 0),
    ]
    assert [(s.num_running, s.num_waiting) for s in stats] == [(1, 0), (0, 0)]


def test_a_lone_step_ahead_is_work_to_be_collected(make_engine):
    engine = make_engine(FakeRunner(16, depth=2))
    (seq_id,) = engine.add(Job((97,)), 0.0)
    pending = engine.launch(0.0)
    engine.abort([seq_id])
    assert engine.has_work
    assert engine.launch(0.0) is None
    engine.collect(pending)
    assert not engine.has_work
