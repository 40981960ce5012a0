"""Who may join, and in which order."""

from __future__ import annotations

import random

import pytest

from ruvon.engine.policies import (
    ORDERS,
    POLICIES,
    Shares,
    WaitingQueue,
    by_arrival,
    by_priority,
    continuous,
    sequential,
    static,
)
from ruvon.engine.types import SamplingParams, Sequence


def sequence(id, priority=0, tenant="", weight=1.0, num_tokens=1):
    return Sequence(
        id=id,
        index=0,
        sampling=SamplingParams(),
        tokens=[1] * num_tokens,
        num_prompt=1,
        max_tokens=1,
        seed=0,
        priority=priority,
        tenant=tenant,
        weight=weight,
    )


@pytest.mark.parametrize(
    ("policy", "waiting", "running", "joining"),
    [
        (sequential, 5, 0, 1),
        (sequential, 5, 1, 0),
        (sequential, 0, 0, 0),
        (static, 9, 0, 4),
        (static, 2, 0, 2),
        (static, 9, 1, 0),
        (continuous, 9, 1, 3),
        (continuous, 2, 1, 2),
        (continuous, 9, 4, 0),
    ],
)
def test_how_many_join(policy, waiting, running, joining):
    assert policy(waiting, running, 4) == joining


def test_every_setting_has_its_function():
    assert set(POLICIES) == {"sequential", "static", "continuous"}
    assert set(ORDERS) == {"fair", "fcfs", "priority"}


def drain(queue):
    ids = []
    while queue:
        seq = queue.first()
        queue.remove(seq)
        ids.append(seq.id)
    return ids


def test_orders():
    members = [sequence(3, priority=1), sequence(1, priority=1), sequence(2, priority=0)]
    for order, ids in ((by_arrival, [1, 2, 3]), (by_priority, [2, 1, 3])):
        queue = WaitingQueue(order)
        for seq in members:
            queue.push(seq)
        assert drain(queue) == ids


def test_a_sequence_comes_back_to_its_place():
    queue = WaitingQueue(by_arrival)
    first, second = sequence(1), sequence(2)
    queue.push(second)
    queue.push(first)
    queue.remove(first)
    assert first not in queue
    queue.push(first)
    assert queue.first() is first
    assert len(queue) == 2


def test_removing_from_the_middle_leaves_no_trace_behind():
    queue = WaitingQueue(by_arrival)
    queue.push(sequence(0))
    for id in range(1, 5000):
        seq = sequence(id)
        queue.push(seq)
        queue.remove(seq)
    assert len(queue) == 1
    assert len(queue._lines[""]) < 100


def test_random_use_agrees_with_sorting():
    rng = random.Random(0)
    queue, members = WaitingQueue(by_priority), {}
    for id in range(2000):
        if members and rng.random() < 0.5:
            seq = members.pop(rng.choice(list(members)))
            queue.remove(seq)
        else:
            seq = members[id] = sequence(id, rng.randrange(3))
            queue.push(seq)
        assert len(queue) == len(members)
        if members:
            assert queue.first() is min(members.values(), key=by_priority)
    assert drain(queue) == [s.id for s in sorted(members.values(), key=by_priority)]


# -------------------------------------------------------------------- tenants


def test_of_several_lines_the_one_goes_first_whose_tenant_was_served_least():
    queue = WaitingQueue(by_arrival)
    for id, tenant in enumerate("aaabbc"):
        queue.push(sequence(id, tenant=tenant))
    order, served = [], {"a": 0.0, "b": 0.0, "c": 1.5}
    while queue:
        seq = queue.first(served)
        served[seq.tenant] += 1
        order.append(seq.id)
        queue.remove(seq)
    assert order == [0, 3, 1, 4, 5, 2]


def test_tokens_that_wait_are_counted_by_tenant():
    queue = WaitingQueue(by_arrival)
    first, second = sequence(0, tenant="a", num_tokens=5), sequence(1, tenant="b", num_tokens=7)
    third = sequence(2, tenant="b", num_tokens=9)
    for seq in (first, second, third):
        queue.push(seq)
    assert (queue.num_tokens, queue.tokens_of("a"), queue.tokens_of("b")) == (21, 5, 16)
    queue.remove(first)
    assert (queue.num_tokens, queue.tokens_of("a")) == (16, 0)
    queue.remove(second)  # the other of its tenant still waits
    assert (queue.num_tokens, queue.tokens_of("b")) == (9, 9)


def test_a_place_counts_who_goes_before():
    queue = WaitingQueue(by_arrival)
    members = [sequence(id, tenant=tenant) for id, tenant in enumerate("aaaaabb")]
    for seq in members:
        queue.push(seq)
    assert [queue.place(seq, fair=False) for seq in members] == [0, 1, 2, 3, 4, 5, 6]
    assert [queue.place(seq, fair=True) for seq in members] == [1, 3, 4, 5, 6, 1, 3]


def test_who_comes_back_has_no_more_claim_than_those_who_stayed():
    shares, a, b = Shares(), sequence(0, tenant="a"), sequence(1, tenant="b", weight=2.0)
    shares.enter(a)
    assert not shares.contended
    shares.enter(b)
    a.num_computed = b.num_computed = 10
    shares.charge(a, 10)
    shares.charge(b, 10)
    assert shares.snapshot() == {"a": 10.0, "b": 5.0}
    shares.leave(a)
    shares.enter(a)
    assert shares.served("a") == 10  # what it owes stays
    shares.leave(b)
    a.num_computed = 30
    shares.charge(a, 20)
    shares.enter(b)
    assert shares.served("b") == 30  # nothing was saved up
    shares.leave(a)
    shares.leave(b)
    shares.enter(a)
    assert shares.served("a") == 0


def test_a_tenant_s_sequences_are_counted():
    shares, one, two = Shares(), sequence(0, tenant="a"), sequence(1, tenant="a")
    shares.enter(one)
    shares.enter(two)
    assert (shares.live("a"), shares.live("b")) == (2, 0)
    shares.leave(one)
    shares.leave(two)
    assert shares.live("a") == 0


def test_what_is_computed_again_is_not_charged_again():
    shares, seq = Shares(), sequence(0, tenant="a")
    shares.enter(seq)
    seq.num_served = 10
    for seq.num_computed, charged in ((8, 0), (16, 6), (17, 7)):
        shares.charge(seq, 8 if seq.num_computed < 17 else 1)
        assert shares.served("a") == charged


def test_a_share_is_by_weight_among_those_who_are_there():
    shares = Shares()
    shares.enter(sequence(0, tenant="a"))
    assert shares.of(100, "a", 1.0) == 100
    assert shares.of(100, "b", 3.0) == 75
    shares.enter(sequence(1, tenant="b", weight=3.0))
    assert (shares.of(100, "a", 1.0), shares.live("b")) == (25, 1)
