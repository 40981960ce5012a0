"""What a recorder keeps of steps, and the trace made of it."""

from __future__ import annotations

import tracemalloc
from collections import deque

import pytest
from fakes import FakeRunner

from ruvon.engine.events import whole
from ruvon.engine.recorder import Abort, Arrival, Recorder, Step
from ruvon.engine.trace import chrome_trace
from ruvon.engine.types import (
    BEING_SAMPLED,
    Chunk,
    Job,
    NewSequence,
    Plan,
    SamplingParams,
    StepStats,
)

STATS = StepStats(1, 4, 2, 1, 90, 100, 0, 0, 0, 0.004)
PROMPT_WORK = [(7, 0, 2, 3, True, ((1,),))]


def prompt_step(step: int = 1, seq_id: int = 7) -> Plan:
    new = NewSequence(seq_id, SamplingParams(), 3, 0, (1, 2))
    return Plan(step, (Chunk(seq_id, 0, (5, 6, 7), 2, ((1,),), True),), (new,))


def single_step(step: int, *seq_ids: int, ended: tuple[int, ...] = ()) -> Plan:
    chunks = tuple([Chunk(seq_id, 0, BEING_SAMPLED, 9, (), True) for seq_id in seq_ids])
    return Plan(step, chunks, ended=ended)


def story() -> Recorder:
    """A sequence that waits, has its prompt computed, is preempted once and finishes; another
    that is aborted."""
    recorder = Recorder()
    recorder.arrived(1.0, [7, 8], 5, 20)
    recorder.stepped(prompt_step(1), 2.0, 3.0, STATS, PROMPT_WORK)
    recorder.aborted(3.5, [8])
    recorder.stepped(single_step(2, 7), 4.0, 5.0, STATS)
    recorder.stepped(single_step(3, 9, ended=(7,)), 6.0, 6.5, STATS)
    recorder.stepped(prompt_step(4), 7.0, 8.0, STATS, PROMPT_WORK, ((7, "stop"),))
    return recorder


def test_single_tokens_are_kept_as_ids():
    first, second = [event for event in story().since(0) if isinstance(event, Step)][:2]
    assert first.work == tuple(PROMPT_WORK)
    assert first.new == ((7, 2),)
    assert second.work == ()
    assert second.rows == (7,)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_scheduler_tells_what_is_more_than_a_single_token(make_engine, depth):
    engine = make_engine(FakeRunner(depth=depth), max_num_batched_tokens=32)
    for num_prompt in (40, 70, 3):
        engine.add(Job((97,) * num_prompt, SamplingParams(max_tokens=40, ignore_eos=True)), 0.0)
    told, ended, pending = 0, [], deque()
    while engine.has_work:
        while (launched := engine.launch(0.0)) is not None:
            more = [
                c for c in launched.plan.chunks if c.blocks or len(c.tokens) > 1 or not c.samples
            ]
            assert launched.work == [whole(chunk) for chunk in more]
            told += len(more)
            pending.append(launched)
        emissions = engine.collect(pending.popleft())
        assert engine.finished == tuple((e.seq_id, e.finish) for e in emissions if e.finish)
        ended += engine.finished
    assert told > 10
    assert sorted(ended) == [(0, "length"), (1, "length"), (2, "length")]


def test_events_are_numbered_and_the_oldest_go_first():
    recorder = Recorder(max_bytes=3000)
    for step in range(100):
        recorder.stepped(single_step(step, 1), 0.0, 1.0, STATS)
    assert recorder.end == 100
    kept = recorder.since(0)
    assert 0 < len(kept) < 10
    assert [event.number for event in recorder.since(98)] == [98, 99]
    assert recorder.since(100) == []


def fill(recorder: Recorder, kind: str, number: int, ids: list[int]) -> None:
    """One more event, of numbers of its own but for the sequences' ids."""
    at = number + 0.5
    match kind:
        case "arrivals":
            recorder.arrived(at, [number], 10_000 + number, 20_000 + number)
        case "aborts":
            recorder.aborted(at, ids)
        case "steps":
            stats = StepStats(*range(number, number + 9), at)
            recorder.stepped(single_step(number, *ids), at, at, stats)


@pytest.mark.parametrize("num_ids", [1, 400])
@pytest.mark.parametrize("kind", ["arrivals", "aborts", "steps"])
def test_it_takes_about_as_much_memory_as_it_may(kind, num_ids):
    most, number = 1 << 20, 1000
    recorder, ids = Recorder(max_bytes=most), [*range(1000, 1000 + num_ids)]
    tracemalloc.start()
    try:
        while len(recorder.since(0)) == recorder.end:
            number += 1
            fill(recorder, kind, number, ids)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert most / 2 < size < 2 * most


def test_arrivals_of_one_request_share_its_number():
    events = story().since(0)
    assert [event.request for event in events if isinstance(event, Arrival)] == [0, 0]
    assert [event.seq_ids for event in events if isinstance(event, Abort)] == [(8,)]


def test_a_trace_shows_each_sequence_from_its_queue_to_its_end():
    entries = chrome_trace(story().since(0))["traceEvents"]
    rows = [(e["name"], e["ts"], e["dur"]) for e in entries if e.get("tid") == 7]
    assert rows == [
        ("queued", 1e6, 1e6),
        ("prefill, 2 cached", 2e6, 1e6),
        ("decode", 3e6, 3e6),
        ("queued", 6e6, 1e6),
        ("prefill, 2 cached", 7e6, 1e6),
        ("decode", 8e6, 0),
        ("sequence 7", 1e6, 7e6),
    ]
    whole = next(e["args"] for e in entries if e["name"] == "sequence 7")
    assert whole["finish"] == "stop"
    assert whole["preempted"] == 1
    assert [e["name"] for e in entries if e.get("tid") == 8] == ["queued", "sequence 8"]
    steps = [(e["name"], e["ts"], e["dur"]) for e in entries if e["name"].startswith("step")]
    assert steps[0] == ("step 1", 2e6, 1e6)
