"""What sequences wait for before their first step, told exactly."""

from __future__ import annotations

import pytest

from ruvon.engine.types import Job, SamplingParams


class Played:
    """An engine whose steps take a second each, in a time of its own."""

    def __init__(self, engine):
        self.engine, self.now = engine, 0.0

    def add(self, num_prompt: int, max_tokens: int = 4, first: int = 97):
        job = Job((first,) * num_prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        (seq_id,) = self.engine.add(job, self.now)
        return self.engine.sequence(seq_id)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            pending = self.engine.launch(self.now)
            self.now += 1
            self.engine.collect(pending)

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()


@pytest.fixture
def played(make_engine):
    return lambda **options: Played(make_engine(**options))


def told(seq) -> tuple[int, dict[str, float]]:
    assert sum(seq.wait.seconds.values()) == seq.scheduled_at - seq.arrived_at
    return seq.wait.num_before, seq.wait.seconds


def test_a_place(played):
    play = played(max_num_seqs=1)
    first, second, third = (play.add(3) for _ in range(3))
    play.finish()
    assert told(first) == (0, {})
    assert told(second) == (1, {"places": 4})
    assert told(third) == (2, {"places": 8})


def test_the_end_of_the_step_under_way(played):
    play = played()
    play.add(3)
    pending = play.engine.launch(play.now)
    play.now += 0.25
    late = play.add(3)
    play.now += 0.5
    play.engine.collect(pending)
    play.finish()
    assert told(late) == (0, {"step": 0.5})


def test_blocks(played):
    play = played(num_blocks=8, max_num_seqs=2)
    play.add(60, 30)  # 6 blocks of the 8
    large = play.add(70, 4, first=98)  # 5
    play.step(10)
    small = play.add(3)
    play.finish()
    assert told(large) == (1, {"blocks": 30})
    assert told(small) == (1, {"blocks": 20})


def test_a_prefix_that_another_computes(played):
    play = played(max_num_batched_tokens=32, max_num_seqs=32)
    play.add(100)
    same = play.add(100)
    play.finish()
    before, waits = told(same)
    assert before == 1
    assert set(waits) == {"prefix"}
    assert same.num_chunks == 1
    assert same.num_cached == 96


def test_others_prompts(played):
    play = played(max_num_batched_tokens=32, max_num_seqs=32)
    long, other = play.add(100), play.add(10, first=98)
    play.finish()
    assert long.num_chunks == 4
    assert told(other) == (1, {"prompts": 3})


def test_what_is_preempted_has_had_its_turn(played):
    play = played(num_blocks=6, max_num_seqs=4)
    first, second = play.add(20, 60), play.add(20, 60, first=98)
    play.finish()
    assert second.num_preempted
    assert told(second) == (1, {})
    assert second.num_chunks > 1
    assert first.num_chunks == 1
