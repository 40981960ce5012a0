"""What a recording says: an engine's schedule as a header and events, a JSON object a line.

What a scheduler asks of tokens is only whether one ends its sequence, and which blocks of two
sequences are alike. So a recording says of tokens how many there are, and has a number for the key
of each block: what people wrote is in it only if that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from ruvon.engine.types import Blocks, Chunk, Endings, FinishReason, Plan, Pooling, Work
from ruvon.errors import LoadError

FORMAT = 1

AS_IT_IS = (
    "num_computed", "num_pending", "num_cached", "num_preempted", "num_served", "headroom",
    "in_flight", "num_published", "leaves_at", "num_claimed", "introduced", "finish",
)  # fmt: skip
"""What a `Standing` says of a sequence in the sequence's own words."""

Rows = tuple[tuple[int, bool], ...]
"""How many tokens each row of a plan sampled, and whether the last of them stopped its sequence."""


@dataclass(frozen=True, slots=True)
class Header:
    """What the scheduler was made of."""

    format: int
    ruvon: str
    block_size: int
    num_blocks: int
    windows: tuple[int, ...]
    longest_chunk: int
    max_seqs: int
    max_tokens: int
    batching: str
    scheduling_policy: str
    chunked: bool
    caching: bool
    stages: int
    contents: bool = False  # whether tokens are in here


@dataclass(frozen=True, slots=True)
class Added:
    """A sequence began to wait."""

    id: int
    index: int
    num_prompt: int
    max_tokens: int
    keys: tuple[int, ...]  # of its full blocks, up to its end: equal numbers, equal prefixes
    priority: int = 0
    tenant: int = 0  # a number for its name
    weight: float = 1.0
    constrained: bool = False  # by a grammar
    prompt_logprobs: bool = False
    pooling: Pooling | None = None
    tokens: tuple[int, ...] = ()  # prompt and output, if contents are recorded
    kind: Literal["add"] = "add"


@dataclass(frozen=True, slots=True)
class Planned:
    """What `Scheduler.schedule` gave at the time ``now``, in seconds."""

    now: float
    step: int
    chunks: tuple[Work, ...]
    new: tuple[tuple[int, int], ...]  # sequence id, tokens found in the prefix cache
    ended: tuple[int, ...]
    prompt_rows: tuple[tuple[int, int, int], ...]  # sequence id, chunk, number of positions
    pooled_rows: tuple[tuple[int, int, int, int], ...]  # sequence id, chunk, first, number
    kind: Literal["plan"] = "plan"


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a sequence was when the recording began; the fields are `Sequence`'s."""

    added: Added
    num_output: int
    num_scored: int  # prompt positions with logprobs
    missing: int | None  # a key's number, as the next
    awaits: int | None
    num_computed: int
    num_pending: int
    num_cached: int
    num_preempted: int
    num_served: int
    headroom: int
    in_flight: int
    num_published: int
    leaves_at: int
    num_claimed: int
    introduced: bool
    finish: FinishReason | None
    tables: Blocks
    blocks: Blocks  # that no chunk has named yet


@dataclass(frozen=True, slots=True)
class Beginning:
    """The state of a scheduler that had been running: a `Snapshot`, and the plans in flight."""

    counters: tuple[int, int, int, int]
    num_committed: int
    held_up: bool
    sequences: tuple[Standing, ...]
    waiting: tuple[int, ...]
    running: tuple[int, ...]
    full: tuple[int, ...]
    ended: tuple[int, ...]
    computing: tuple[tuple[int, int], ...]  # a key's number, who makes that block
    served: tuple[tuple[int, float], ...]  # tenant, tokens over its weight
    blank: tuple[int, ...]
    cached: tuple[int, ...]
    keys: tuple[tuple[int, int, int], ...]  # block, its key's number and cache group
    in_flight: tuple[Planned, ...]
    kind: Literal["begin"] = "begin"


@dataclass(frozen=True, slots=True)
class Aborted:
    ids: tuple[int, ...]
    kind: Literal["abort"] = "abort"


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The prefix cache was emptied."""

    kind: Literal["forget"] = "forget"


@dataclass(frozen=True, slots=True)
class Waited:
    """`Scheduler.schedule` gave no plan at the time ``now``; it may have handed out blocks."""

    now: float
    kind: Literal["wait"] = "wait"


@dataclass(frozen=True, slots=True)
class Committed:
    """A step's result, and what became of its sequences."""

    step: int
    rows: Rows
    ended: tuple[int, ...]
    errors: tuple[int, ...]
    scored: Mapping[int, int]  # sequence id → prompt positions with logprobs
    finished: Endings
    kind: Literal["commit"] = "commit"


@dataclass(frozen=True, slots=True)
class Failed:
    """A step that came to nothing."""

    step: int
    finished: Endings
    kind: Literal["fail"] = "fail"


Event = Beginning | Added | Aborted | Forgotten | Planned | Waited | Committed | Failed


@cache
def readers() -> tuple[TypeAdapter[Header], TypeAdapter[Event]]:
    """Made when something is read: writing needs none, and a server does not wait for them."""
    return TypeAdapter(Header), TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def planned(plan: Plan, now: float) -> Planned:
    """A plan without its tokens and settings."""
    return Planned(
        now,
        plan.step,
        tuple([whole(chunk) for chunk in plan.chunks]),
        tuple([(seq.seq_id, len(seq.prefix)) for seq in plan.new]),
        plan.ended,
        tuple([(row.seq_id, row.chunk, len(row.targets)) for row in plan.prompt_rows]),
        tuple([(row.seq_id, row.chunk, row.first, row.count) for row in plan.pooled_rows]),
    )


def whole(chunk: Chunk) -> Work:
    return (
        chunk.seq_id,
        chunk.generation,
        chunk.start,
        len(chunk.tokens),
        chunk.samples,
        chunk.blocks,
    )


def line(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE)


def read(lines: Iterable[bytes]) -> Iterator[Header | Event]:
    """A file's header, then its events. Raises LoadError, with the line's number."""
    header, event = readers()
    for number, text in enumerate(lines, 1):
        try:
            yield header.validate_json(text) if number == 1 else event.validate_json(text)
        except ValidationError as error:
            what = error.errors()[0]
            told = ": ".join(filter(None, (".".join(map(str, what["loc"])), what["msg"])))
            raise LoadError(f"line {number} of the recording: {told}") from error
