"""Recorded steps as a Chrome trace, which opens in Perfetto (ui.perfetto.dev) or chrome://tracing.

One track shows the steps, one row each sequence with its waiting, its prompt and its answer, and
counters run below. The format is the "Trace Event Format" of Chromium's documentation; times there
are in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ruvon.engine.recorder import Abort, Arrival, Event, Step

ENGINE, SEQUENCES = 1, 2  # what Chrome calls processes

Entry = dict[str, Any]


@dataclass(slots=True)
class Life:
    """Where a sequence is, as far as the trace has come."""

    phase: str
    since: float
    arrival: Arrival | None = None
    num_tokens: int = 0  # that it sampled
    num_preempted: int = 0


def chrome_trace(events: Iterable[Event]) -> dict[str, Any]:
    """Events in order as a trace; sequences whose beginning is not there start with the first."""
    entries = [name_of(ENGINE, "engine"), name_of(SEQUENCES, "sequences")]
    lives: dict[int, Life] = {}
    last = 0.0
    for event in events:
        last = event.at
        if isinstance(event, Arrival):
            lives[event.seq_id] = Life("queued", event.at, event)
        elif isinstance(event, Abort):
            for seq_id in event.seq_ids:
                entries += leave(lives, seq_id, event.at, "abort")
        else:
            entries += step_entries(event)
            entries += advance(lives, event)
    for seq_id in [*lives]:
        entries += leave(lives, seq_id, last, "")
    return {"traceEvents": entries, "displayTimeUnit": "ms"}


def step_entries(step: Step) -> Iterator[Entry]:
    """A step, and the counters as it left them."""
    stats = step.stats
    what: Entry = {
        "tokens": step.num_tokens,
        "sampled": len(step.rows),
        "device_ms": round(1000 * stats.seconds, 3),
        "preempted": stats.num_preempted,
        "cached": stats.num_cached,
    }
    if step.failure:
        what["failure"] = step.failure
    yield span(ENGINE, 0, f"step {step.number}", step.planned_at, step.at, what)
    used = stats.num_blocks - stats.num_free_blocks
    yield counter("sequences", step.at, running=stats.num_running, waiting=stats.num_waiting)
    yield counter("blocks", step.at, used=used)


def advance(lives: dict[int, Life], step: Step) -> Iterator[Entry]:
    """What a step meant for its sequences."""
    finished = {seq_id for seq_id, _ in step.finished}
    for seq_id in step.left:
        life = lives.get(seq_id)
        if life is not None and life.phase != "queued" and seq_id not in finished:
            yield end_phase(seq_id, life, step.planned_at)
            life.phase, life.since = "queued", step.planned_at
            life.num_preempted += 1
    for seq_id, num_cached in step.new:
        life = lives.setdefault(seq_id, Life("queued", step.planned_at))
        yield end_phase(seq_id, life, step.planned_at)
        life.phase, life.since = f"prefill, {num_cached} cached", step.planned_at
    for seq_id in step.rows:
        life = lives.setdefault(seq_id, Life("decode", step.planned_at))
        life.num_tokens += 1
        if life.phase.startswith("prefill"):
            yield end_phase(seq_id, life, step.at)
            life.phase, life.since = "decode", step.at
    for seq_id, reason in step.finished:
        yield from leave(lives, seq_id, step.at, reason)


def leave(lives: dict[int, Life], seq_id: int, at: float, reason: str) -> Iterator[Entry]:
    """A sequence's last phase, and its whole life above it."""
    life = lives.pop(seq_id, None)
    if life is None:
        return
    yield end_phase(seq_id, life, at)
    if life.arrival is not None:
        what = {
            "request": life.arrival.request,
            "prompt": life.arrival.num_prompt,
            "max_tokens": life.arrival.max_tokens,
            "tokens": life.num_tokens,
            "preempted": life.num_preempted,
            "finish": reason,
        }
        yield span(SEQUENCES, seq_id, f"sequence {seq_id}", life.arrival.at, at, what)


def end_phase(seq_id: int, life: Life, at: float) -> Entry:
    return span(SEQUENCES, seq_id, life.phase, life.since, max(at, life.since), {})


def span(process: int, track: int, name: str, begin: float, end: float, what: Entry) -> Entry:
    return {
        "ph": "X",
        "pid": process,
        "tid": track,
        "name": name,
        "ts": round(1e6 * begin, 1),
        "dur": round(1e6 * (end - begin), 1),
        "args": what,
    }


def counter(name: str, at: float, **values: int) -> Entry:
    return {"ph": "C", "pid": ENGINE, "name": name, "ts": round(1e6 * at, 1), "args": values}


def name_of(process: int, name: str) -> Entry:
    return {"ph": "M", "pid": process, "name": "process_name", "args": {"name": name}}
