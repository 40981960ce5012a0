"""One step at a time: what is planned, and what a result does."""

from __future__ import annotations

import pytest
from fakes import fake_logprobs

from ruvon.engine.blocks import BlockPool
from ruvon.engine.grouped_pool import GroupedPool
from ruvon.engine.policies import ORDERS, POLICIES, Limits
from ruvon.engine.scheduler import Scheduler
from ruvon.engine.types import BEING_SAMPLED, NewSequence, SamplingParams, Sequence, StepResult

EOS = 2


def make(num_blocks=64, block_size=4, *, order="fcfs", policy="continuous", **limits):
    limits = {"max_seqs": 8, "max_tokens": 32} | limits
    return Scheduler(
        GroupedPool(BlockPool(num_blocks, block_size)),
        Limits(policy=POLICIES[policy], order=ORDERS[order], **limits),
    )


def sequence(id, tokens, max_tokens=8, *, stop_ids=(EOS,), priority=0, tenant="", **sampling):
    wants = sampling.get("prompt_logprobs") is not None
    return Sequence(
        id=id,
        index=0,
        sampling=SamplingParams(**sampling),
        tokens=list(tokens),
        num_prompt=len(tokens),
        max_tokens=max_tokens,
        seed=0,
        stop_ids=frozenset(stop_ids),
        priority=priority,
        tenant=tenant,
        prompt_logprobs=[None] if wants else None,
    )


def result(plan, token=9, **fields):
    return StepResult(
        tokens=((token,),) * len(plan.rows), logprobs=(None,) * len(plan.rows), **fields
    )


def step(scheduler, token=9):
    """Plan and commit one step: the shares it had by sequence, and its emissions."""
    plan = scheduler.schedule(0.0)
    shares = {chunk.seq_id: len(chunk.tokens) for chunk in plan.chunks}
    return shares, scheduler.commit(plan, result(plan, token))


def run_out(scheduler, most=200):
    emissions = []
    while scheduler.has_work:
        most -= 1
        assert most, "no end in sight"
        emissions += step(scheduler)[1]
    return emissions


# -------------------------------------------------------------------- the budget


def test_stages_have_a_step_each_and_no_token_is_waited_for_in_one():
    """A prompt's chunks follow each other; streams take turns, half of them in each step."""
    scheduler = make(max_tokens=10, stages=2)
    for id in range(4):
        scheduler.add(sequence(id, range(10 * id + 10, 10 * id + 16)))
    plans = [scheduler.schedule(0.0) for _ in range(3)]
    shares = [[(chunk.seq_id, len(chunk.tokens)) for chunk in plan.chunks] for plan in plans]
    assert shares == [[(0, 6), (1, 4)], [(1, 2), (2, 6), (3, 2)], [(3, 4)]]
    assert scheduler.schedule(0.0) is None
    for plan in plans:
        scheduler.commit(plan, result(plan))
    for _ in range(3):
        plans = [scheduler.schedule(0.0) for _ in range(3)]
        assert [plan and plan.rows for plan in plans] == [(0, 1), (2, 3), None]
        assert all(chunk.tokens == (9,) for plan in plans[:2] for chunk in plan.chunks)
        for plan in plans[:2]:
            scheduler.commit(plan, result(plan))


def test_a_prompt_then_one_token_a_step():
    scheduler = make()
    scheduler.add(sequence(0, range(10, 20), max_tokens=2))
    plan = scheduler.schedule(0.0)
    (chunk,) = plan.chunks
    assert chunk.tokens == tuple(range(10, 20))
    assert (chunk.start, chunk.samples, len(chunk.blocks[0])) == (0, True, 3)
    assert plan.rows == (0,)
    assert plan.new == (NewSequence(0, SamplingParams(), 10, 0),)
    (emission,) = scheduler.commit(plan, result(plan))
    assert (emission.tokens, emission.finish) == ((9,), None)
    plan = scheduler.schedule(0.0)
    assert (plan.chunks[0].tokens, plan.chunks[0].start) == ((9,), 10)
    assert (plan.chunks[0].blocks, plan.new) == ((), ())
    (emission,) = scheduler.commit(plan, result(plan))
    assert emission.finish == "length"
    assert not scheduler.has_work
    scheduler.pool.check([])


def test_a_long_prompt_is_computed_in_chunks_and_draws_after_the_last():
    scheduler = make(max_tokens=8)
    scheduler.add(sequence(0, range(20, 39)))
    plans = []
    for _ in range(3):
        plans.append(scheduler.schedule(0.0))
        scheduler.commit(plans[-1], result(plans[-1]))
    assert [(p.chunks[0].start, len(p.chunks[0].tokens)) for p in plans] == [
        (0, 8),
        (8, 8),
        (16, 3),
    ]
    assert [p.chunks[0].samples for p in plans] == [False, False, True]


def test_running_tokens_go_before_prompts():
    scheduler = make(max_tokens=8)
    scheduler.add(sequence(0, [5, 6]))
    scheduler.add(sequence(1, [7, 8]))
    step(scheduler)
    scheduler.add(sequence(2, range(10, 30)))
    scheduler.add(sequence(3, range(30, 50)))
    assert step(scheduler)[0] == {0: 1, 1: 1, 2: 6}
    assert step(scheduler)[0] == {0: 1, 1: 1, 2: 6}
    assert step(scheduler)[0] == {0: 1, 1: 1, 2: 6}
    assert step(scheduler)[0] == {0: 1, 1: 1, 2: 2, 3: 4}


def test_without_chunking_a_prompt_waits_for_a_step_that_holds_it():
    scheduler = make(max_tokens=8, chunked=False)
    scheduler.add(sequence(0, range(10, 16)))
    scheduler.add(sequence(1, range(20, 26)))
    assert step(scheduler)[0] == {0: 6}
    assert step(scheduler)[0] == {0: 1, 1: 6}


def test_without_chunking_a_prompt_over_the_budget_gets_steps_alone():
    scheduler = make(max_tokens=8, chunked=False)
    scheduler.add(sequence(0, [5]))
    step(scheduler)
    scheduler.add(sequence(1, range(20, 40)))
    scheduler.add(sequence(2, range(40, 48)))  # fits the budget, but not beside the others
    assert step(scheduler)[0] == {1: 8}
    assert step(scheduler)[0] == {0: 1}
    assert step(scheduler)[0] == {1: 8}
    assert step(scheduler)[0] == {0: 1, 1: 4}
    assert step(scheduler)[0] == {2: 8}
    assert step(scheduler)[0] == {0: 1, 1: 1, 2: 1}


def test_no_more_run_than_allowed():
    scheduler = make(max_seqs=2)
    for id in range(3):
        scheduler.add(sequence(id, [5 + id], max_tokens=2))
    assert step(scheduler)[0] == {0: 1, 1: 1}
    assert len(scheduler.waiting) == 1
    step(scheduler)
    assert step(scheduler)[0] == {2: 1}


def test_static_batches_form_whole_even_if_the_budget_does_not_hold_their_prompts():
    scheduler = make(max_seqs=2, max_tokens=8, policy="static")
    for id in range(4):
        scheduler.add(sequence(id, range(10 * id, 10 * id + 8), max_tokens=2))
    shares = [step(scheduler)[0] for _ in range(4)]
    assert shares == [{0: 8}, {0: 1, 1: 7}, {1: 1}, {1: 1}]
    assert step(scheduler)[0] == {2: 8}


def test_priority_orders_the_queue_and_the_budget():
    scheduler = make(max_seqs=2, max_tokens=4, order="priority")
    scheduler.add(sequence(0, range(10, 18), priority=5))
    scheduler.add(sequence(1, range(20, 28), priority=5))
    scheduler.add(sequence(2, range(30, 38), priority=1))
    assert step(scheduler)[0] == {2: 4}
    assert list(scheduler.running) == [2, 0]


# -------------------------------------------------------------------- the prefix cache


def test_a_later_sequence_finds_the_prefix_but_computes_the_last_token():
    scheduler = make()
    scheduler.add(sequence(0, range(10, 18), max_tokens=1))
    step(scheduler)
    scheduler.add(sequence(1, range(10, 18), max_tokens=1))
    plan = scheduler.schedule(0.0)
    assert (plan.chunks[0].start, plan.chunks[0].tokens) == (4, (14, 15, 16, 17))
    (emission,) = scheduler.commit(plan, result(plan))
    assert emission.num_cached == 4
    assert (scheduler.counters.cached, scheduler.counters.queried) == (4, 16)


def test_generated_tokens_are_found_too():
    scheduler = make()
    scheduler.add(sequence(0, [5, 6, 7], max_tokens=6))
    run_out(scheduler)
    scheduler.add(sequence(1, [5, 6, 7, 9, 9, 9, 9, 9, 1]))
    assert step(scheduler)[0] == {1: 1}


def test_siblings_wait_for_the_first_to_compute_their_prompt():
    scheduler = make(max_tokens=8)
    for id in range(3):
        scheduler.add(sequence(id, range(10, 24)))
    assert step(scheduler)[0] == {0: 8}
    assert len(scheduler.running) == 3
    assert step(scheduler)[0] == {0: 6}
    assert step(scheduler)[0] == {0: 1, 1: 2, 2: 2}
    first, second, third = (seq.tables[0] for seq in scheduler.running.values())
    assert first[:3] == second[:3] == third[:3]
    assert len({first[3], second[3], third[3]}) == 3


def test_those_who_wait_do_not_hold_up_others():
    scheduler = make(max_tokens=8)
    scheduler.add(sequence(0, range(10, 16)))
    scheduler.add(sequence(1, range(10, 16)))
    scheduler.add(sequence(2, [5]))
    assert step(scheduler)[0] == {0: 6, 2: 1}


@pytest.mark.parametrize("end", ["abort", "error"])
def test_those_who_wait_compute_the_prompt_if_the_first_goes_away(end):
    scheduler = make(max_tokens=8)
    scheduler.add(sequence(0, range(10, 24)))
    scheduler.add(sequence(1, range(10, 24)))
    plan = scheduler.schedule(0.0)
    if end == "abort":
        scheduler.abort(0)
        scheduler.commit(plan, result(plan))
        assert step(scheduler)[0] == {1: 8}
    else:
        scheduler.commit(plan, result(plan, errors={0: "broken"}))
        assert step(scheduler)[0] == {1: 8}


def test_without_caching_nothing_is_shared_and_nobody_waits():
    scheduler = make(caching=False)
    scheduler.add(sequence(0, range(10, 18)))
    scheduler.add(sequence(1, range(10, 18)))
    assert step(scheduler)[0] == {0: 8, 1: 8}
    assert scheduler.counters.queried == 0


# -------------------------------------------------------------------- pressure


def test_the_latest_is_preempted_and_comes_back():
    scheduler = make(num_blocks=5, block_size=2)
    old, new = sequence(0, [5, 6], max_tokens=6), sequence(1, [7, 8], max_tokens=6)
    scheduler.add(old)
    scheduler.add(new)
    while not scheduler.counters.preempted:
        step(scheduler)
    assert list(scheduler.running) == [0]
    assert new.num_preempted == 1
    assert new in scheduler.waiting
    assert new.tables == ()
    emissions = run_out(scheduler)
    assert [e.seq_id for e in emissions if e.finish] == [0, 1]
    assert (old.num_output, new.num_output) == (6, 6)
    scheduler.pool.check([])


def test_a_prompt_preempted_half_way_starts_its_logprobs_again():
    scheduler = make(num_blocks=6, block_size=2, max_tokens=3)
    scheduler.add(sequence(0, [5, 6], max_tokens=8))
    prompt = range(10, 18)
    scheduler.add(sequence(1, prompt, max_tokens=1, prompt_logprobs=0))
    emissions = []
    while scheduler.has_work:
        plan = scheduler.schedule(0.0)
        scored = {
            row.seq_id: tuple(fake_logprobs(token, 0) for token in row.targets)
            for row in plan.prompt_rows
        }
        emissions += scheduler.commit(plan, result(plan, prompt_logprobs=scored))
    assert scheduler.counters.preempted == 1
    (scores,) = [e.prompt_logprobs for e in emissions if e.prompt_logprobs]
    assert [score and score.token for score in scores] == [None, *prompt[1:]]


def test_a_prefix_found_again_after_preemption_is_not_counted_again():
    scheduler = make(num_blocks=6, block_size=2)
    scheduler.add(sequence(0, [5, 6], max_tokens=8))
    scheduler.add(sequence(1, range(10, 16), max_tokens=6))
    emissions = run_out(scheduler)
    assert scheduler.counters.preempted == 1
    assert scheduler.counters.queried == 2 + 6
    assert scheduler.counters.cached == 0
    assert {e.num_cached for e in emissions} == {0}


def test_the_least_important_is_preempted_even_if_it_came_first():
    scheduler = make(num_blocks=5, block_size=2, order="priority")
    scheduler.add(sequence(0, [5, 6], max_tokens=6, priority=1))
    scheduler.add(sequence(1, [7, 8], max_tokens=6, priority=0))
    while not scheduler.counters.preempted:
        step(scheduler)
    assert list(scheduler.running) == [1]


def test_a_more_important_newcomer_is_not_the_one_that_is_preempted():
    scheduler = make(num_blocks=7, block_size=2, order="priority")
    scheduler.add(sequence(0, [5, 6], max_tokens=10, priority=1))
    step(scheduler)
    scheduler.add(sequence(1, [7, 8], max_tokens=10, priority=0))
    while not scheduler.counters.preempted:
        step(scheduler)
    assert list(scheduler.running) == [1]


def test_a_newcomer_waits_until_the_running_ones_have_a_block_to_grow_into():
    scheduler = make(num_blocks=4, block_size=2)
    scheduler.add(sequence(0, [5, 6], max_tokens=6))
    scheduler.add(sequence(1, [7, 8, 9, 10, 11], max_tokens=3))
    assert step(scheduler)[0] == {0: 2}
    assert scheduler.pool.num_free == 3  # enough for its prompt, but the other grows first
    assert list(scheduler.running) == [0]
    assert len(run_out(scheduler)) == 5 + 3
    assert scheduler.counters.preempted == 0


def test_nobody_overtakes_one_that_waited_for_a_prefix_and_now_lacks_blocks():
    scheduler = make(num_blocks=10, block_size=2, max_tokens=64)
    prompt = list(range(10, 19))
    scheduler.add(sequence(0, prompt, max_tokens=4))
    scheduler.add(sequence(1, [*prompt[:2], *range(30, 41)], max_tokens=1))
    assert step(scheduler)[0] == {0: 9}
    for id in (2, 3, 4):  # there would be room for these
        scheduler.add(sequence(id, [id], max_tokens=1))
        assert step(scheduler)[0] == {0: 1}
    assert 1 in step(scheduler)[0]
    assert [e.seq_id for e in run_out(scheduler)][-2:] == [3, 4]


def test_a_sequence_that_could_never_fit_is_refused():
    scheduler = make(num_blocks=2, block_size=4)
    with pytest.raises(ValueError, match="for ever"):
        scheduler.add(sequence(0, range(10), max_tokens=8))


# -------------------------------------------------------------------- finishing


@pytest.mark.parametrize(
    ("stop_ids", "tokens", "finish", "stop_token"),
    [
        ((EOS,), [9, EOS], "stop", EOS),
        ((), [9, EOS, 9], "length", None),
        ((EOS, 7), [9, 7], "stop", 7),
        ((EOS,), [9, 9, EOS], "stop", EOS),
    ],
)
def test_reasons_to_finish(stop_ids, tokens, finish, stop_token):
    scheduler = make()
    scheduler.add(sequence(0, [5, 6], max_tokens=3, stop_ids=stop_ids))
    for token in tokens:
        _, (emission,) = step(scheduler, token)
    assert emission.tokens == (tokens[-1],)
    assert (emission.finish, emission.stop_token) == (finish, stop_token)
    assert not scheduler.has_work


def test_nothing_to_generate_computes_the_prompt_and_ends():
    scheduler = make(max_tokens=4)
    scheduler.add(sequence(0, [5, 6, 7, 8, 9, 10], max_tokens=0, prompt_logprobs=1))
    plan = scheduler.schedule(0.0)
    assert plan.rows == ()
    assert plan.prompt_rows[0].targets == (6, 7, 8, 9)
    one = tuple(fake_logprobs(token, 1) for token in plan.prompt_rows[0].targets)
    assert scheduler.commit(plan, result(plan, prompt_logprobs={0: one})) == []
    plan = scheduler.schedule(0.0)
    assert plan.prompt_rows[0].targets == (10,)
    two = (fake_logprobs(10, 1),)
    (emission,) = scheduler.commit(plan, result(plan, prompt_logprobs={0: two}))
    assert (emission.tokens, emission.finish) == ((), "length")
    assert emission.prompt_logprobs == (None, *one, *two)


def test_prompt_logprobs_skip_the_prefix_cache_and_come_once():
    scheduler = make()
    scheduler.add(sequence(0, range(10, 20), max_tokens=1))
    step(scheduler)
    seq = sequence(1, range(10, 20), max_tokens=2, prompt_logprobs=0)
    scheduler.add(seq)
    plan = scheduler.schedule(0.0)
    assert plan.chunks[0].start == 0
    targets = plan.prompt_rows[0].targets
    assert targets == tuple(range(11, 20))
    scored = {1: tuple(fake_logprobs(token, 0) for token in targets)}
    (emission,) = scheduler.commit(plan, result(plan, prompt_logprobs=scored))
    assert [entry and entry.token for entry in emission.prompt_logprobs] == [None, *targets]
    plan = scheduler.schedule(0.0)
    assert plan.prompt_rows == ()
    (emission,) = scheduler.commit(plan, result(plan))
    assert emission.prompt_logprobs is None


@pytest.mark.parametrize("wanted", [0, 3])
def test_runners_are_told_how_many_alternatives_a_prompt_s_tokens_have(wanted):
    scheduler = make()
    scheduler.add(sequence(0, range(10, 20), prompt_logprobs=wanted))
    (rows,) = scheduler.schedule(0.0).prompt_rows
    assert rows.num_top == wanted


def test_it_is_noted_when_a_sequence_is_first_computed():
    scheduler = make(max_tokens=8)
    seq = sequence(0, range(10, 22))
    scheduler.add(seq)
    for now in (3.0, 4.0, 5.0):
        plan = scheduler.schedule(now)
        assert seq.scheduled_at == 3.0
        scheduler.commit(plan, result(plan))


def test_an_error_ends_its_sequence_and_no_other():
    scheduler = make()
    scheduler.add(sequence(0, [5, 6]))
    scheduler.add(sequence(1, [7, 8]))
    plan = scheduler.schedule(0.0)
    drawn = StepResult(((), (9,)), (None, None), errors={0: "not a number"})
    bad, good = scheduler.commit(plan, drawn)
    assert (bad.seq_id, bad.finish, bad.error) == (0, "error", "not a number")
    assert (good.seq_id, good.tokens, good.finish) == (1, (9,), None)
    scheduler.pool.check(scheduler.sequences[1].tables)


# -------------------------------------------------------------------- a step ahead


def test_a_step_ahead_computes_the_token_being_sampled():
    scheduler = make()
    seq = sequence(0, [5, 6, 7, 8], max_tokens=3)
    scheduler.add(seq)
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    (chunk,) = second.chunks
    assert (chunk.tokens, chunk.start, chunk.samples) == (BEING_SAMPLED, 4, True)
    assert (len(first.chunks[0].blocks[0]), len(chunk.blocks[0])) == (1, 1)
    assert seq.tokens == [5, 6, 7, 8]
    (emission,) = scheduler.commit(first, result(first, 9))
    assert emission.tokens == (9,)
    third = scheduler.schedule(0.0)
    assert (third.chunks[0].tokens, third.chunks[0].start) == (BEING_SAMPLED, 5)
    (emission,) = scheduler.commit(second, result(second, 10))
    assert (emission.tokens, emission.finish) == ((10,), None)
    assert scheduler.schedule(0.0) is None
    (emission,) = scheduler.commit(third, result(third, 11))
    assert (emission.tokens, emission.finish) == ((11,), "length")
    scheduler.pool.check([])


def test_the_token_is_known_again_when_nothing_is_under_way():
    scheduler = make()
    scheduler.add(sequence(0, [5, 6]))
    step(scheduler)
    assert scheduler.schedule(0.0).chunks[0].tokens == (9,)


def test_steps_are_committed_in_order():
    scheduler = make()
    scheduler.add(sequence(0, [5, 6]))
    scheduler.schedule(0.0)
    second = scheduler.schedule(0.0)
    with pytest.raises(RuntimeError, match="step 2 where 1 is next"):
        scheduler.commit(second, result(second))


def test_chunks_of_a_prompt_follow_each_other_without_waiting():
    scheduler = make(max_tokens=8)
    prompt = range(10, 24)
    scheduler.add(sequence(0, prompt, prompt_logprobs=0))
    plans = [scheduler.schedule(0.0), scheduler.schedule(0.0)]
    assert [plan.chunks[0].tokens for plan in plans] == [tuple(prompt[:8]), tuple(prompt[8:])]
    emissions = []
    for plan in plans:
        (row,) = plan.prompt_rows
        scored = {0: tuple(fake_logprobs(token, 0) for token in row.targets)}
        emissions += scheduler.commit(plan, result(plan, prompt_logprobs=scored))
    (emission,) = emissions
    assert [entry and entry.token for entry in emission.prompt_logprobs] == [None, *prompt[1:]]


@pytest.mark.parametrize("end", ["stop", "error", "abort"])
def test_what_is_computed_beyond_the_end_is_dropped_and_its_blocks_kept_so_long(end):
    scheduler = make()
    scheduler.add(sequence(0, [5, 6, 7, 8]))
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    if end == "stop":
        (emission,) = scheduler.commit(first, result(first, EOS))
        assert (emission.tokens, emission.finish) == ((EOS,), "stop")
    elif end == "error":
        (emission,) = scheduler.commit(first, result(first, errors={0: "broken"}))
        assert (emission.tokens, emission.finish) == ((), "error")
    else:
        scheduler.abort(0)
        assert scheduler.commit(first, result(first)) == []
    assert not scheduler.has_work
    assert scheduler.schedule(0.0) is None
    assert scheduler.pool.num_free == 62
    assert scheduler.commit(second, result(second)) == []
    scheduler.pool.check([])


def test_a_sequence_that_ends_is_given_no_more_blocks():
    scheduler = make(num_blocks=3, block_size=2)
    scheduler.add(sequence(0, [5, 6], max_tokens=4))
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    scheduler.commit(first, result(first))
    third = scheduler.schedule(0.0)  # fills its second block
    scheduler.abort(0)
    assert scheduler.schedule(0.0) is None
    assert scheduler.pool.num_free == 1
    scheduler.commit(second, result(second))
    scheduler.commit(third, result(third))
    scheduler.pool.check([])


def test_a_place_is_free_while_the_last_token_is_drawn():
    scheduler = make(max_seqs=1)
    scheduler.add(sequence(0, [5], max_tokens=2))
    scheduler.add(sequence(1, [6], max_tokens=2))
    plans = [scheduler.schedule(0.0)]
    for _ in range(3):
        plans.append(scheduler.schedule(0.0))
        scheduler.commit(plans[-2], result(plans[-2]))
    assert [plan.chunks[0].seq_id for plan in plans] == [0, 0, 1, 1]


def test_nobody_is_preempted_while_a_step_is_under_way():
    """Two need a block, and one is left."""
    scheduler = make(num_blocks=5, block_size=2)
    scheduler.add(sequence(0, [5, 6, 7], max_tokens=5))
    scheduler.add(sequence(1, [8, 9, 10], max_tokens=5))
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    scheduler.commit(first, result(first))
    assert scheduler.schedule(0.0) is None
    assert list(scheduler.running) == [0, 1]
    scheduler.commit(second, result(second))
    plan = scheduler.schedule(0.0)
    assert [chunk.seq_id for chunk in plan.chunks] == [0]
    assert scheduler.counters.preempted == 1
    scheduler.commit(plan, result(plan))
    assert len(run_out(scheduler)) == 10 - 2 * 2 - 1


def test_nobody_is_preempted_if_a_step_under_way_frees_enough():
    scheduler = make(num_blocks=5, block_size=2)
    scheduler.add(sequence(0, [5, 6, 7], max_tokens=5))
    scheduler.add(sequence(1, [8, 9, 10], max_tokens=5))
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    scheduler.commit(first, result(first))
    assert scheduler.schedule(0.0) is None
    scheduler.commit(second, StepResult(((9,), (EOS,)), (None, None)))
    run_out(scheduler)
    assert scheduler.counters.preempted == 0


# -------------------------------------------------------------------- aborting


def test_abort_while_waiting():
    scheduler = make(max_seqs=1)
    scheduler.add(sequence(0, [5]))
    scheduler.add(sequence(1, [6]))
    step(scheduler)
    scheduler.abort(1)
    assert len(scheduler.waiting) == 0
    assert all(e.seq_id == 0 for e in run_out(scheduler))


def test_abort_between_steps_frees_at_once():
    scheduler = make()
    scheduler.add(sequence(0, range(10, 20)))
    step(scheduler)
    scheduler.abort(0)
    assert not scheduler.has_work
    scheduler.pool.check([])


def test_abort_in_flight_keeps_the_blocks_until_the_commit():
    scheduler = make()
    scheduler.add(sequence(0, range(10, 20)))
    plan = scheduler.schedule(0.0)
    scheduler.abort(0)
    scheduler.abort(0)
    assert not scheduler.has_work
    assert scheduler.pool.num_free == 61
    assert len(plan.chunks[0].blocks[0]) == 3
    assert scheduler.commit(plan, result(plan)) == []
    scheduler.pool.check([])


def test_abort_of_the_preempted_the_awaiting_the_unknown_and_the_finished():
    scheduler = make(num_blocks=5, block_size=2)
    scheduler.add(sequence(0, [5, 6], max_tokens=6))
    scheduler.add(sequence(1, [7, 8], max_tokens=6))
    while not scheduler.counters.preempted:
        step(scheduler)
    scheduler.abort(1)
    scheduler.abort(77)
    run_out(scheduler)
    scheduler.abort(0)
    scheduler.add(sequence(2, [5, 7, 7, 7], max_tokens=2))
    scheduler.add(sequence(3, [5, 7, 7, 7], max_tokens=2))
    plan = scheduler.schedule(0.0)
    assert scheduler.running[3].awaits is not None
    scheduler.abort(3)
    scheduler.commit(plan, result(plan))
    run_out(scheduler)
    scheduler.pool.check([])


# -------------------------------------------------------------------- plans as values


def test_runners_are_told_of_each_block_once_and_who_is_over():
    scheduler = make(block_size=2)
    seq = sequence(0, [5, 6, 7], max_tokens=4)
    scheduler.add(seq)
    told, plans = [], []
    while scheduler.has_work:
        plans.append(scheduler.schedule(0.0))
        for blocks in plans[-1].chunks[0].blocks:
            told += blocks
        blocks = list(seq.tables[0])
        scheduler.commit(plans[-1], result(plans[-1]))
        assert told == blocks
    assert [len(plan.new) for plan in plans] == [1, 0, 0, 0]
    scheduler.add(sequence(1, [8]))
    assert scheduler.schedule(0.0).ended == (0,)


def test_a_preempted_sequence_is_ended_and_introduced_anew():
    scheduler = make(num_blocks=5, block_size=2)
    scheduler.add(sequence(0, [5, 6], max_tokens=6))
    scheduler.add(sequence(1, [7, 8], max_tokens=6))
    while not scheduler.counters.preempted:
        before = scheduler.schedule(0.0)
        scheduler.commit(before, result(before))
    ended, again = {*before.ended}, None
    while again is None:
        plan = scheduler.schedule(0.0)
        ended |= {*plan.ended}
        again = next((new for new in plan.new if new.seq_id == 1), None)
        if again is None:
            scheduler.commit(plan, result(plan))
    assert 1 in ended
    (chunk,) = [chunk for chunk in plan.chunks if chunk.seq_id == 1]
    assert chunk.generation == 1
    assert len(again.prefix) == chunk.start
    assert (*again.prefix, *chunk.tokens)[:3] == (7, 8, 9)
    assert tuple(map(tuple, scheduler.sequences[1].tables)) == chunk.blocks


# -------------------------------------------------------------------- several tokens a step


def test_a_step_may_bring_several_tokens():
    """As accepted drafts do. What they bring is computed in the next step."""
    scheduler = make(block_size=2)
    seq = sequence(0, [5, 6], max_tokens=6, logprobs=0)
    scheduler.add(seq)
    plan = scheduler.schedule(0.0)
    scores = tuple(fake_logprobs(token, 0) for token in (9, 8, 7))
    (emission,) = scheduler.commit(plan, StepResult(((9, 8, 7),), (scores,)))
    assert (emission.tokens, emission.logprobs) == ((9, 8, 7), scores)
    plan = scheduler.schedule(0.0)
    (chunk,) = plan.chunks
    assert (chunk.tokens, chunk.start, len(chunk.blocks[0])) == ((9, 8, 7), 2, 2)
    (emission,) = scheduler.commit(plan, StepResult(((6, 5, 4, 3),), (None,)))
    assert (emission.tokens, emission.finish) == ((6, 5, 4), "length")
    scheduler.pool.check([])


def test_nothing_comes_after_a_stop_token():
    scheduler = make()
    scheduler.add(sequence(0, [5, 6], max_tokens=6))
    plan = scheduler.schedule(0.0)
    (emission,) = scheduler.commit(plan, StepResult(((9, EOS, 7),), (None,)))
    assert (emission.tokens, emission.finish, emission.stop_token) == ((9, EOS), "stop", EOS)


# -------------------------------------------------------------------- what a step may cost


def test_keys_of_a_long_prompt_are_computed_as_it_is():
    """Hashing all of it at once would hold the event loop."""
    scheduler = make(num_blocks=1000, max_tokens=32)
    seq = sequence(0, range(3000))
    scheduler.add(seq)
    lengths = []
    for _ in range(3):
        step(scheduler)
        lengths.append(len(seq.keys))
    assert lengths == [9, 17, 25]


def test_many_completions_of_a_long_prompt_start_a_few_a_step(monkeypatch):
    monkeypatch.setattr("ruvon.engine.queues.STARTED_BLOCKS", 20)
    scheduler = make(num_blocks=1000, block_size=4, max_tokens=512)
    for k in range(8):
        scheduler.add(sequence(k, range(33), max_tokens=9))
    sizes = [len(step(scheduler)[0]) for _ in range(5)]
    assert sizes == [1, 4, 7, 8, 8]
    run_out(scheduler)
    scheduler.pool.check([])


def test_who_is_blocked_is_looked_up_again_only_when_something_has_changed(monkeypatch):
    scheduler = make(num_blocks=8, block_size=4)
    scheduler.add(sequence(0, range(10, 20), max_tokens=9))
    step(scheduler)
    scheduler.add(sequence(1, range(10, 40), max_tokens=2))
    looked_up, match = [], scheduler.pool.match
    monkeypatch.setattr(scheduler.pool, "match", lambda keys: looked_up.append(1) or match(keys))
    while 0 in scheduler.running:
        step(scheduler)
    # at first, and when the third block of the same prefix is or is not the other's
    assert len(looked_up) <= 2
    run_out(scheduler)
    assert scheduler.counters.queried == 40
    assert len(looked_up) <= 3


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("order", ["fair", "fcfs", "priority"])
def test_no_stream_waits_longer_than_one_chunk_however_many_long_prompts_come(chunked, order):
    scheduler = make(max_tokens=8, chunked=chunked, order=order, num_blocks=600)
    scheduler.add(sequence(0, [5], max_tokens=40))
    step(scheduler)
    gap = num_computed = 0
    for id in range(1, 30):
        scheduler.add(sequence(id, [id] * 60, max_tokens=1, tenant=str(id % 3)))
        shares, _ = step(scheduler)
        assert sum(shares.values()) <= 8
        gap = 0 if 0 in shares else gap + 1
        assert gap <= 1
        num_computed += sum(shares.values())
    assert num_computed > 4 * 29  # and prompts get on


def test_it_says_why_somebody_is_not_started():
    """Who is told of, why, and how many run, how many blocks there are, or who computes."""
    scheduler = make(max_seqs=1)
    for id in range(3):
        scheduler.add(sequence(id, [5 + id]))
    assert not_started(scheduler) == ((1, "places", 1),)

    scheduler = make(num_blocks=4, block_size=2)
    scheduler.add(sequence(0, [5, 6], max_tokens=6))
    scheduler.add(sequence(1, [7, 8, 9, 10, 11], max_tokens=3))
    assert not_started(scheduler) == ((1, "blocks", 2),)

    scheduler = make(max_tokens=8)
    for id in range(2):
        scheduler.add(sequence(id, range(10, 24)))
    assert not_started(scheduler) == ((1, "prefix", 0),)

    scheduler = make(max_seqs=4, policy="static")
    scheduler.add(sequence(0, [5]))
    assert not_started(scheduler) == ()
    scheduler.add(sequence(1, [6]))
    assert not_started(scheduler) == ((1, "places", 1),)
    run_out(scheduler)
    assert scheduler.not_started == ()


def not_started(scheduler):
    step(scheduler)
    return scheduler.not_started
