"""Recording: an engine's schedule in a file, and the same schedule again without a model.

`add`, `abort`, `schedule` and `commit` are all that ever happens to a scheduler. A recording holds
these calls in order, with the plans that came of them; `ruvon.engine.replay` makes them again and
compares. What a scheduler asks of tokens is only whether one ends its sequence, and which blocks of
two sequences are alike. So a recording says of tokens how many there are, and has a number for the
key of each block: what people wrote is in it only if that was asked for.

The file has a JSON object a line: a `Header`, then `Event`s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import orjson
from pydantic import Field, TypeAdapter, ValidationError

from ruvon.engine.blocks import extend_keys
from ruvon.engine.grouped_pool import without_group
from ruvon.engine.snapshot import Snapshot
from ruvon.engine.types import (
    Blocks,
    Chunk,
    Endings,
    FinishReason,
    Plan,
    Pooling,
    Sequence,
    StepResult,
    Work,
)
from ruvon.errors import LoadError

FORMAT = 1

AS_IT_IS = (
    "num_computed", "num_pending", "num_cached", "num_preempted", "num_served", "headroom",
    "in_flight", "num_published", "leaves_at", "num_claimed", "introduced", "finish",
)  # fmt: skip
"""What a `Standing` says of a sequence in the sequence's own words."""
MOST_CHUNKS = 200_000  # of a recording's steps; it ends by itself then, at some 50 MB

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

Raw = (
    Sequence
    | Aborted
    | Forgotten
    | Waited
    | tuple[Plan, float]
    | tuple[Plan, StepResult | None, Endings]
)

EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])
HEADER: TypeAdapter[Header] = TypeAdapter(Header)


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


class Recording:
    """Gathers what an engine does until it is full or somebody closes it. It is cheap to feed: what
    comes in is kept as it is, and only `lines` looks into it, in any thread."""

    def __init__(
        self,
        header: Header,
        snapshot: Snapshot,
        in_flight: Iterable[Plan],
        sequences: Iterable[Sequence],
        most_steps: int,
        on_full: Callable[[], None],
    ) -> None:
        """``snapshot`` is of the scheduler when ``in_flight`` was, with its live ``sequences``."""
        self._header = header
        self._snapshot = snapshot
        self._in_flight = tuple(in_flight)
        self._most_steps = most_steps
        self._on_full = on_full
        self._num_chunks = 0
        self._sequences = {seq.id: seq for seq in sequences}
        self._events: list[Raw] = []
        self.num_steps = 0

    def added(self, seq: Sequence) -> None:
        self._sequences[seq.id] = seq
        self._events.append(seq)

    def aborted(self, ids: Iterable[int]) -> None:
        self._events.append(Aborted(tuple(ids)))

    def forgotten(self) -> None:
        self._events.append(Forgotten())

    def planned(self, plan: Plan, now: float) -> None:
        self.num_steps += 1
        self._num_chunks += len(plan.chunks)
        self._events.append((plan, now))
        if self.num_steps == self._most_steps or self._num_chunks >= MOST_CHUNKS:
            self._on_full()

    def waited(self, now: float) -> None:
        self._events.append(Waited(now))

    def committed(self, plan: Plan, result: StepResult | None, finished: Endings) -> None:
        """``result`` is None for a step that failed."""
        self._events.append((plan, result, finished))

    def lines(self, contents: bool = False) -> Iterator[bytes]:
        """The file, a line at a time. Sequences that still run are taken as far as they are."""
        yield line(replace(self._header, contents=contents))
        numbers = Numbers()
        yield line(self._beginning(numbers, contents))
        for event in self._events:
            if isinstance(event, Sequence):
                yield line(self._added(event, numbers, contents))
            elif not isinstance(event, tuple):
                yield line(event)
            elif len(event) == 2:
                yield line(planned(*event))
            else:
                yield line(self._committed(*event))

    def _beginning(self, numbers: Numbers, contents: bool) -> Beginning:
        snapshot, queues, pool = self._snapshot, self._snapshot.queues, self._snapshot.pool
        keys = [(block, *without_group(key)) for block, key in pool.keys.items()]
        return Beginning(
            counters=snapshot.counters,
            num_committed=snapshot.num_committed,
            held_up=snapshot.held_up,
            sequences=tuple([self._standing(seq, numbers, contents) for seq in snapshot.sequences]),
            waiting=queues.waiting,
            running=queues.running,
            full=queues.full,
            ended=queues.ended,
            computing=tuple([(numbers[key], seq_id) for key, seq_id in queues.computing.items()]),
            served=tuple([(numbers[name], served) for name, served in queues.served.items()]),
            blank=pool.blank,
            cached=pool.cached,
            keys=tuple([(block, numbers[key], group) for block, key, group in keys]),
            in_flight=tuple([planned(plan, 0.0) for plan in self._in_flight]),
        )

    def _standing(self, then: Sequence, numbers: Numbers, contents: bool) -> Standing:
        scored = then.prompt_logprobs
        return Standing(
            added=self._added(self._sequences[then.id], numbers, contents),
            num_output=then.num_output,
            num_scored=0 if scored is None else len(scored),
            missing=None if then.missing is None else numbers[then.missing],
            awaits=None if then.awaits is None else numbers[then.awaits],
            tables=tuple([tuple(table) for table in then.tables]),
            blocks=then.added,
            **{name: getattr(then, name) for name in AS_IT_IS},
        )

    def _added(self, seq: Sequence, numbers: Numbers, contents: bool) -> Added:
        size = self._header.block_size
        tokens, keys = tuple(seq.tokens), list(seq.keys)
        extend_keys(keys, len(tokens) // size, tokens, size, seq.salt)
        return Added(
            id=seq.id,
            index=seq.index,
            num_prompt=seq.num_prompt,
            max_tokens=seq.max_tokens,
            keys=tuple([numbers[key] for key in keys]),
            priority=seq.priority,
            tenant=numbers[seq.tenant],
            weight=seq.weight,
            constrained=seq.sampling.grammar is not None,
            prompt_logprobs=seq.prompt_logprobs is not None,
            pooling=seq.pooling,
            tokens=tokens if contents else (),
        )

    def _committed(
        self, plan: Plan, result: StepResult | None, finished: Endings
    ) -> Committed | Failed:
        if result is None:
            return Failed(plan.step, finished)
        stop_ids = [self._sequences[seq_id].stop_ids for seq_id in plan.rows]
        return Committed(
            step=plan.step,
            rows=tuple(
                [
                    (len(tokens), bool(tokens) and tokens[-1] in ids)
                    for tokens, ids in zip(result.tokens, stop_ids, strict=True)
                ]
            ),
            ended=tuple(result.ended),
            errors=tuple(result.errors),
            scored={seq_id: len(row) for seq_id, row in result.prompt_logprobs.items()},
            finished=finished,
        )


class Numbers(dict[bytes | str, int]):
    """Numbers for keys of blocks and for names, in the order in which they are asked for."""

    def __missing__(self, key: bytes | str) -> int:
        self[key] = len(self)
        return self[key]


def line(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE)


def read(lines: Iterable[bytes]) -> Iterator[Header | Event]:
    """A file's header, then its events. Raises LoadError, with the line's number."""
    for number, text in enumerate(lines, 1):
        try:
            yield HEADER.validate_json(text) if number == 1 else EVENT.validate_json(text)
        except ValidationError as error:
            what = error.errors()[0]
            told = ": ".join(filter(None, (".".join(map(str, what["loc"])), what["msg"])))
            raise LoadError(f"line {number} of the recording: {told}") from error
