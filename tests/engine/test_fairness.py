"""Tenants share an engine: by weight, by tokens, and no greedy one keeps the others waiting."""

from __future__ import annotations

import pytest
from fakes import FakeRunner

from ruvon.engine.types import Job, SamplingParams
from ruvon.errors import QueueFullError

GREEDY, MODEST = "greedy", "modest"


def job(tenant, number=0, num_prompt=12, num_output=8, weight=1.0):
    """A request like no other."""
    prompt = tuple((number * 31 + i * i) % 251 for i in range(num_prompt))
    sampling = SamplingParams(max_tokens=num_output, ignore_eos=True, temperature=0)
    return Job(prompt, sampling, tenant=tenant, weight=weight)


def take_step(engine):
    """One step: tokens that it computed, by sequence, and who has finished."""
    pending = engine.launch(0.0)
    computed = {chunk.seq_id: len(chunk.tokens) for chunk in pending.plan.chunks}
    return computed, {each.seq_id for each in engine.collect(pending) if each.finish}


def shares_of(engine, tenants, num_steps):
    """How many tokens each tenant is served while all of them always have requests waiting."""
    owner, served = {}, dict.fromkeys(tenants, 0)
    for step in range(num_steps):
        for tenant, options in tenants.items():
            for number in range(3):
                (seq_id,) = engine.add(job(tenant, 1000 * step + number, **options), 0.0)
                owner[seq_id] = tenant
        for seq_id, num_tokens in take_step(engine)[0].items():
            served[owner[seq_id]] += num_tokens
    return served


@pytest.fixture
def make(make_engine):
    """An engine with room for four sequences and 24 tokens a step."""

    def make(**fields):
        fields = {"max_num_seqs": 4, "max_num_batched_tokens": 24} | fields
        return make_engine(FakeRunner(16), fields.pop("num_blocks", 64), **fields)

    return make


def test_tenants_get_tokens_by_weight_whatever_their_requests_look_like(make):
    tenants = {
        "short": {"num_prompt": 4, "num_output": 3},
        "long": {"num_prompt": 60, "num_output": 30},
        "heavy": {"weight": 2.0},
    }
    served = shares_of(make(max_num_queued_reqs=100_000), tenants, 400)
    assert served["long"] == pytest.approx(served["short"], rel=0.1)
    assert served["heavy"] == pytest.approx(2 * served["short"], rel=0.1)


def steps_for_one(engine, num_greedy):
    """How many steps a modest request takes behind so many greedy ones."""
    for number in range(num_greedy):
        engine.add(job(GREEDY, number, num_prompt=40, num_output=20), 0.0)
    for _ in range(5 if num_greedy else 0):
        take_step(engine)
    (seq_id,) = engine.add(job(MODEST, 9999), 0.0)
    steps = 1
    while seq_id not in take_step(engine)[1]:
        steps += 1
    return steps


def test_a_greedy_tenant_does_not_make_others_wait_for_its_queue(make):
    alone = steps_for_one(make(), 0)
    beside = {num: steps_for_one(make(), num) for num in (10, 100, 400)}
    assert beside[400] == beside[100] == beside[10]  # however long its queue is
    assert beside[400] <= 2 * alone
    in_order = steps_for_one(make(scheduling_policy="fcfs"), 100)
    assert in_order > 10 * beside[100]


def test_a_greedy_tenants_prompts_leave_others_their_part_of_a_step(make):
    engine = make(max_num_seqs=8)
    for number in range(7):
        engine.add(job(GREEDY, number, num_prompt=200), 0.0)
    take_step(engine)
    (seq_id,) = engine.add(job(MODEST, 99, num_prompt=100), 0.0)
    computed = [take_step(engine)[0] for _ in range(12)]
    assert sum(each.get(seq_id, 0) for each in computed) >= 100


def run_long(engine, tenant, number):
    """Long requests of a tenant, started."""
    ids = [engine.add(job(tenant, n, num_output=100), 0.0)[0] for n in range(number)]
    while engine.load[1]:
        take_step(engine)
    return ids


def test_who_has_less_than_its_share_of_places_gets_one_at_once(make):
    engine = make()
    greedy = run_long(engine, GREEDY, 4)
    modest = [engine.add(job(MODEST, 90 + n, num_output=50), 0.0)[0] for n in range(3)]
    for _ in range(3):
        take_step(engine)
    assert len(take_step(engine)[0].keys() & {*modest}) == 2  # of four, and no more
    assert engine._scheduler.counters.preempted == 2
    late = engine.add(job("late", 99), 0.0)
    for _ in range(5):  # until one of the others has been served more
        take_step(engine)
    assert len(take_step(engine)[0].keys() & {*late}) == 1
    assert len(take_step(engine)[0].keys() & {*greedy}) >= 1
    assert engine._scheduler.counters.preempted == 3


def test_a_cache_full_of_a_greedy_tenants_sequences_gives_way_too(make):
    engine = make(num_blocks=20, enable_prefix_caching=False)
    run_long(engine, GREEDY, 3)
    for _ in range(60):  # until they hold most of it
        take_step(engine)
    (seq_id,) = engine.add(job(MODEST, 99, num_prompt=120), 0.0)
    steps = 1
    while seq_id not in take_step(engine)[0]:
        steps += 1
    assert steps <= 3


def test_nobody_gives_way_where_batches_are_static(make):
    engine = make(batching="static")
    run_long(engine, GREEDY, 4)
    engine.add(job(MODEST, 99), 0.0)
    for _ in range(20):
        take_step(engine)
    assert engine._scheduler.counters.preempted == 0


def test_a_full_queue_has_room_for_those_who_have_less_than_their_share(make):
    engine = make(max_num_queued_reqs=8)
    for number in range(12):
        engine.add(job(GREEDY, number), 0.0)
    with pytest.raises(QueueFullError) as caught:
        engine.add(job(GREEDY, 99), 0.0)
    assert (caught.value.setting, caught.value.excess) == ("max_num_queued_reqs", 1)
    for number in range(6):
        engine.add(job(MODEST, number), 0.0)
    with pytest.raises(QueueFullError):
        engine.add(job(MODEST, 99), 0.0)


def test_a_queue_is_bounded_by_tokens(make):
    engine = make(max_num_queued_tokens=100)
    engine.add(job(GREEDY, 0, num_prompt=200), 0.0)  # larger, but nobody waits
    with pytest.raises(QueueFullError, match="200 tokens are waiting") as caught:
        engine.add(job(GREEDY, 1, num_prompt=10), 0.0)
    assert (caught.value.setting, caught.value.excess) == ("max_num_queued_tokens", 110)
    engine.add(job(MODEST, 2, num_prompt=50), 0.0)
    with pytest.raises(QueueFullError):
        engine.add(job(MODEST, 3, num_prompt=50), 0.0)


def test_without_fairness_a_full_queue_is_full_for_all(make):
    engine = make(max_num_queued_reqs=8, scheduling_policy="fcfs")
    for number in range(12):
        engine.add(job(GREEDY, number), 0.0)
    with pytest.raises(QueueFullError):
        engine.add(job(MODEST), 0.0)
