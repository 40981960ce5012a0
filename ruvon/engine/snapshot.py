"""Snapshot: the state of a scheduler as a value, which another one of the same making can be put
into. A recording of an engine that has been running begins with one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ruvon.engine.blocks import PoolState
from ruvon.engine.types import Sequence


@dataclass(frozen=True, slots=True)
class QueueState:
    """Who waits and who runs, as sequence ids."""

    waiting: tuple[int, ...]
    running: tuple[int, ...]
    full: tuple[int, ...]  # need blocks for their next step
    ended: tuple[int, ...]  # whom runners are to forget with the next plan
    computing: Mapping[bytes, int]  # key of a block in the making → who makes it
    served: Mapping[str, float]  # tenant → tokens over its weight; nothing where that is not asked


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a scheduler decides by, besides what it was made of."""

    counters: tuple[int, int, int, int]  # steps, cached, queried, preempted
    num_committed: int
    held_up: bool
    sequences: tuple[Sequence, ...]
    queues: QueueState
    pool: PoolState


def copied(seq: Sequence) -> Sequence:
    """A sequence that stays as it is. What is in its lists never changes, but for block tables."""
    scored = seq.prompt_logprobs
    return replace(
        copy.copy(seq),
        tokens=list(seq.tokens),
        keys=list(seq.keys),
        tables=tuple([list(table) for table in seq.tables]),
        prompt_logprobs=None if scored is None else list(scored),
    )
