"""What a page that watches an engine is told: how it stands, then each event of the recorder.

An event is a short list, its kind first, as `encode` has it. Whoever has the state at one
event has it at the next, by the rules that the scheduler itself goes by: blocks come with `Work`,
and go when a sequence ends, is preempted, or has moved its window on. What cannot be told that way
is which free blocks can still be found as a prefix; `Standing` says that, now and then anew.

There are no tokens in it, and no text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ruvon.engine.recorder import Abort, Arrival, Event
from ruvon.engine.scheduler import Scheduler
from ruvon.engine.types import Blocks, Chunk, Plan, Sequence


@dataclass(slots=True)
class Live:
    """A sequence, as far as committed steps have brought it."""

    id: int
    generation: int
    num_prompt: int
    num_output: int
    max_tokens: int
    num_computed: int
    num_cached: int
    tables: Blocks
    waits: bool


def without(tables: Blocks, added: Blocks) -> Blocks:
    """Tables before they grew by what was added last."""
    pairs = zip(tables, added, strict=False)
    return tuple([table[: len(table) - len(its)] for table, its in pairs])


@dataclass(frozen=True, slots=True)
class Standing:
    """An engine between two of its events."""

    next: int  # the number of the event that comes next
    now: float  # seconds, monotonic
    sequences: list[Live]  # in the order in which they came
    cached: list[int]  # free blocks that can be found as a prefix, least recently used first


def stand(scheduler: Scheduler, in_flight: Iterable[Plan], number: int, now: float) -> Standing:
    """Where a scheduler is, apart from what plans ``in_flight`` bring: that is still to come, as
    events from ``number`` on. Takes microseconds a sequence, and for each thousand blocks."""
    coming: dict[int, list[Chunk]] = {}
    for plan in in_flight:
        for chunk in plan.chunks:
            coming.setdefault(chunk.seq_id, []).append(chunk)
    sequences = [
        live(seq, seq in scheduler.waiting, coming.get(seq.id, ()))
        for seq in scheduler.sequences.values()
        if seq.finish is None
    ]
    return Standing(number, now, sequences, scheduler.pool.cached)


def live(seq: Sequence, waits: bool, in_flight: Iterable[Chunk]) -> Live:
    """``in_flight``: its chunks in steps that are not committed. What they bring is still to come,
    as events."""
    tables = tuple([tuple(table) for table in seq.tables])
    num_computed = seq.num_computed
    if seq.added:
        tables = without(tables, seq.added)
    for chunk in in_flight:
        if chunk.generation == seq.num_preempted:
            num_computed -= len(chunk.tokens)
            if chunk.blocks:
                tables = without(tables, chunk.blocks)
    return Live(
        seq.id,
        seq.num_preempted,
        seq.num_prompt,
        seq.num_output,
        seq.max_tokens,
        num_computed,
        seq.num_cached,
        tables,
        waits,
    )


def encode(event: Event) -> list[Any]:
    """``["arrival", at, sequence, request, prompt tokens, most tokens]``, ``["abort", at,
    sequences]``, or ``["step", ...]`` with the fields of `Step`, and of its stats what is not in
    there already: running, waiting, free blocks, cached and queried tokens, preemptions, seconds on
    the device."""
    if isinstance(event, Arrival):
        what = [event.seq_id, event.request, event.num_prompt, event.max_tokens]
        return ["arrival", event.at, *what]
    if isinstance(event, Abort):
        return ["abort", event.at, event.seq_ids]
    s = event.stats
    stats = [
        s.num_running, s.num_waiting, s.num_free_blocks, s.num_cached, s.num_queried,
        s.num_preempted, s.seconds,
    ]  # fmt: skip
    return [
        "step", event.at, event.number, event.planned_at, event.rows, event.work, event.new,
        event.left, event.finished, stats, event.not_started, event.failure,
    ]  # fmt: skip
