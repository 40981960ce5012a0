"""Who may join, and in which order."""

from __future__ import annotations

import random

import pytest

from ruvon.engine.policies import (
    ORDERS,
    POLICIES,
    WaitingQueue,
    by_arrival,
    by_priority,
    continuous,
    sequential,
    static,
)
from ruvon.engine.types import SamplingParams, Sequence


def sequence(id, priority=0):
    return Sequence(
        id=id,
        index=0,
        sampling=SamplingParams(),
        tokens=[1],
        num_prompt=1,
        max_tokens=1,
        seed=0,
        priority=priority,
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
    assert set(ORDERS) == {"fcfs", "priority"}


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
    assert len(queue._heap) < 100


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
