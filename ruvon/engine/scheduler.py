"""Which tokens are computed in the next step, and what a step's result means for each sequence.

There is no prefill and no decode: a sequence has tokens, some of them computed, and scheduling
closes the gap (`Sequence.num_pending`). A step may mix whole prompts, chunks of prompts, single
new tokens and recomputation after preemption.

Pure functions of this object's state and the events it is given: no clock, no I/O, no tensors.
`queues` says who runs, `budget` how much of whom is computed, `prefixes` what need not be, and
`outcome` what came of it.

A step may be planned while the one before is still under way, so that the device never waits for
the host. What a launched step computes counts as computed. Its new tokens are not known yet, but
it is known how many there are: a `PLACEHOLDER` stands in for one, and no step goes beyond a
sequence's ``max_tokens``. Whether a token ends its sequence is found out a step late: what the next
step computed for it then is dropped. It did no harm, since a sequence keeps its blocks until the
last step that uses them is committed. Tokens are appended and blocks published only by `commit`.
"""

from __future__ import annotations

from collections.abc import Iterable

from ruvon.engine.budget import Budget
from ruvon.engine.grouped_pool import GroupedPool
from ruvon.engine.outcome import accept, fail
from ruvon.engine.policies import Limits, Shares, WaitingQueue
from ruvon.engine.queues import Queues
from ruvon.engine.snapshot import Snapshot, copied
from ruvon.engine.steps import Counters
from ruvon.engine.types import (
    BEING_SAMPLED,
    NO_BLOCKS,
    Chunk,
    Emission,
    Endings,
    FinishReason,
    NewSequence,
    NotStarted,
    Plan,
    PooledRows,
    PromptRow,
    Sequence,
    StepResult,
    Work,
)

NOTHING_SAMPLED: tuple[tuple[int, ...], None] = ((), None)


class Scheduler:
    """Owns the sequences and their blocks. Steps are committed in the order they were planned.
    At most two are planned and not committed, or one more than a step has stages."""

    def __init__(self, grouped: GroupedPool, limits: Limits) -> None:
        self.grouped = grouped
        self.pool = grouped.pool
        self.counters = Counters()
        self.sequences: dict[int, Sequence] = {}  # waiting, running, and those that end with a step
        self.num_with_grammar = 0  # of ``sequences``
        self.work: list[Work] = []  # of the latest plan
        self.finished: Endings = ()  # with the step committed last
        self._queues = Queues(grouped, limits, self.counters)
        self._budget = Budget(limits.max_tokens, limits.chunked, limits.stages)
        self._num_committed = 0  # steps

    @property
    def waiting(self) -> WaitingQueue:
        return self._queues.waiting

    @property
    def shares(self) -> Shares | None:
        """What tenants have been served, where that counts."""
        return self._queues.shares

    @property
    def running(self) -> dict[int, Sequence]:
        return self._queues.running

    @property
    def not_started(self) -> NotStarted:
        """Who was not started with the latest plan, and why."""
        return self._queues.not_started

    @property
    def has_work(self) -> bool:
        """Whether `schedule` has something to plan, now or after the next `commit`."""
        return bool(self.running) or len(self.waiting) > 0

    @property
    def num_in_flight(self) -> int:
        """Steps planned and not committed."""
        return self.counters.steps - self._num_committed

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Raises ValueError for one that no empty cache holds."""
        needed = self.grouped.most_blocks(seq.num_prompt + seq.max_tokens)
        if needed > self.pool.num_blocks:
            raise ValueError(f"{needed} blocks of {self.pool.num_blocks}: it would wait for ever")
        self.sequences[seq.id] = seq
        self.num_with_grammar += seq.sampling.grammar is not None
        if self.shares is not None:
            self.shares.enter(seq)
        self._queues.waits.enter(seq)
        self.waiting.push(seq)

    def abort(self, seq_id: int) -> None:
        """Drop a sequence in whatever state; unknown and finished ids are ignored.

        One that is in flight keeps its blocks until the last step that uses them is committed.
        """
        seq = self.sequences.get(seq_id)
        if seq is None or seq.finish is not None:
            return
        seq.finish = "abort"
        if seq in self.waiting:
            self.waiting.remove(seq)
        self._end(seq)

    def schedule(self, now: float) -> Plan | None:
        """Plan one step, at the time ``now``; None if something must be committed first, or there
        is no work. Never None if there is work and nothing in flight."""
        self._queues.waits.turn(now)
        if not self._queues.fill(self.num_in_flight):
            return None
        shares = self._budget.share(self.running.values(), forced=self.num_with_grammar > 0)
        return self._plan(shares, now) if shares else None

    def snapshot(self) -> Snapshot:
        """All that comes next depends on, between two steps; takes milliseconds where there are
        many blocks."""
        counters = self.counters
        return Snapshot(
            (counters.steps, counters.cached, counters.queried, counters.preempted),
            self._num_committed,
            self._budget.held_up,
            tuple([copied(seq) for seq in self.sequences.values()]),
            self._queues.state(),
            self.pool.state(),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on, as new as this is, from where a scheduler made like this one was; the snapshot's
        sequences are this one's from here on."""
        counters = self.counters
        counters.steps, counters.cached, counters.queried, counters.preempted = snapshot.counters
        self._num_committed = snapshot.num_committed
        self._budget.held_up = snapshot.held_up
        self.sequences = {seq.id: seq for seq in snapshot.sequences}
        self.num_with_grammar = sum(s.sampling.grammar is not None for s in snapshot.sequences)
        self._queues.restore(snapshot.queues, self.sequences)
        tables = [table for seq in snapshot.sequences for table in seq.tables]
        self.pool.restore(snapshot.pool, tables)

    def commit(self, plan: Plan, result: StepResult) -> list[Emission]:
        """Take in what a step sampled: append tokens, publish blocks, finish sequences. Raises
        RuntimeError for a step that is not the next."""
        self._num_committed += 1
        if plan.step != self._num_committed:
            raise RuntimeError(f"step {plan.step} where {self._num_committed} is next")
        emissions = []
        finished: list[tuple[int, FinishReason]] = []
        sampled = iter(zip(result.tokens, result.logprobs, strict=True))
        for chunk in plan.chunks:
            tokens, logprobs = next(sampled) if chunk.samples else NOTHING_SAMPLED
            seq = self.sequences[chunk.seq_id]
            seq.in_flight -= 1
            if seq.finish is not None:  # it ended while this step was under way
                self._end(seq)
                continue
            if seq.id in result.errors:
                emission: Emission | None = fail(seq, result.errors[seq.id])
            else:
                end = chunk.start + len(chunk.tokens)
                self._take_in(seq, end, result)
                emission = accept(seq, end, tokens, logprobs, seq.id in result.ended)
            if emission is not None:
                emissions.append(emission)
                if seq.finish is not None:
                    finished.append((seq.id, seq.finish))
                    self._end(seq)
                elif len(emission.tokens) > 1:
                    self._queues.pend(seq, len(emission.tokens) - 1)
        self.finished = tuple(finished)
        return emissions

    def fail(self, plan: Plan, error: str) -> list[Emission]:
        """Take in that a step came to nothing: its sequences end with ``error``, all others go on.
        Nothing it wrote was published; what a step launched on top of it draws is dropped."""
        nothing = StepResult(
            tokens=((),) * len(plan.rows),
            logprobs=(None,) * len(plan.rows),
            errors={chunk.seq_id: error for chunk in plan.chunks},
        )
        return self.commit(plan, nothing)

    def _plan(self, shares: list[tuple[Sequence, int]], now: float) -> Plan:
        """The step in which each sequence computes its share."""
        chunks: list[Chunk] = []
        work: list[Work] = []
        new: list[NewSequence] = []
        prompt_rows: list[PromptRow] = []
        pooled_rows: list[PooledRows] = []
        for seq, num_tokens in shares:
            start = seq.num_computed
            blocks = seq.added
            if num_tokens == 1 and start == len(seq.tokens):  # what most steps are made of
                chunks.append(Chunk(seq.id, seq.num_preempted, BEING_SAMPLED, start, blocks, True))
                if blocks:
                    seq.added = NO_BLOCKS
                    work.append((seq.id, seq.num_preempted, start, 1, True, blocks))
                self._queues.advance(seq, 1)
                continue
            if not seq.introduced:
                new.append(introduce(seq))
            end = start + num_tokens
            if start < seq.num_prompt:
                prompt_rows += prompt_rows_of(seq, len(chunks), start, end)
                pooled_rows += pooled_rows_of(seq, len(chunks), start, end)
                self._queues.prefixes.claim(seq, end // self.pool.block_size)
                seq.num_chunks += 1
                if seq.scheduled_at is None:
                    seq.scheduled_at = now
                    self._queues.waits.begin(seq)
            samples = num_tokens == seq.num_pending and seq.max_tokens > 0
            tokens = tuple(seq.tokens[start:end])
            chunks.append(Chunk(seq.id, seq.num_preempted, tokens, start, blocks, samples))
            if blocks or num_tokens > 1 or not samples:
                seq.added = NO_BLOCKS
                work.append((seq.id, seq.num_preempted, start, num_tokens, samples, blocks))
            self._queues.advance(seq, num_tokens)
        self.counters.steps += 1
        self.work = work
        return Plan(
            self.counters.steps,
            tuple(chunks),
            tuple(new),
            self._queues.take_ended(),
            tuple(prompt_rows),
            tuple(pooled_rows),
        )

    def _take_in(self, seq: Sequence, end: int, result: StepResult) -> None:
        """The first ``end`` tokens are computed: what that gives besides new ones."""
        self._queues.prefixes.publish(seq, end)
        if self.grouped.slides and end >= seq.leaves_at:
            seq.leaves_at = self.grouped.leave(seq.tables, end)
        if seq.prompt_logprobs is not None:
            seq.prompt_logprobs.extend(result.prompt_logprobs.get(seq.id, ()))
        if seq.id in result.pooled:
            sum_C = result.pooled[seq.id]
            seq.pooled = sum_C if seq.pooled is None else seq.pooled + sum_C

    def _end(self, seq: Sequence) -> None:
        """A sequence is over, and nothing of it stays but its published blocks; not before its last
        step has been committed."""
        self._queues.leave(seq)
        if not seq.in_flight:
            del self.sequences[seq.id]
            self.num_with_grammar -= seq.sampling.grammar is not None
            self._queues.free(seq)
            if self.shares is not None:
                self.shares.leave(seq)


def introduce(seq: Sequence) -> NewSequence:
    """What goes with the first chunk of each generation of a sequence."""
    seq.introduced = True
    prefix = tuple(seq.tokens[: seq.num_computed])
    return NewSequence(seq.id, seq.sampling, seq.num_prompt, seq.seed, prefix)


def prompt_rows_of(seq: Sequence, chunk: int, start: int, end: int) -> Iterable[PromptRow]:
    """Of a chunk's prompt tokens, those whose successors are to be scored."""
    if seq.lacks_prompt_logprobs and start + 1 < seq.num_prompt:
        targets = tuple(seq.tokens[start + 1 : min(end + 1, seq.num_prompt)])
        yield PromptRow(seq.id, chunk, targets, seq.sampling.prompt_logprobs or 0)


def pooled_rows_of(seq: Sequence, chunk: int, start: int, end: int) -> Iterable[PooledRows]:
    """Of a chunk's prompt tokens, those whose hidden states are wanted."""
    if seq.pooling == "mean":
        yield PooledRows(seq.id, chunk, 0, end - start)
    elif seq.pooling is not None and end == seq.num_prompt:
        yield PooledRows(seq.id, chunk, end - start - 1, 1)
