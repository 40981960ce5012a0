"""Recording: what an engine's scheduler is asked and answers, in a file.

`add`, `abort`, `schedule` and `commit` are all that ever happens to a scheduler. A recording holds
these calls in order, as `ruvon.engine.events`, with the plans that came of them;
`ruvon.engine.replay` makes them again without a model and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from ruvon.engine.blocks import extend_keys
from ruvon.engine.events import (
    AS_IT_IS,
    Aborted,
    Added,
    Beginning,
    Committed,
    Failed,
    Forgotten,
    Header,
    Standing,
    Waited,
    line,
    planned,
)
from ruvon.engine.grouped_pool import without_group
from ruvon.engine.snapshot import Snapshot
from ruvon.engine.types import Endings, Plan, Sequence, StepResult

MOST_CHUNKS = 200_000  # of a recording's steps; it ends by itself then, at some 50 MB

Raw = (
    Sequence
    | Aborted
    | Forgotten
    | Waited
    | tuple[Plan, float]
    | tuple[Plan, StepResult | None, Endings]
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
