"""Which tokens are computed in the next step, and what a step's result means for each sequence.

There is no prefill and no decode: a sequence has tokens, some of them computed, and scheduling
closes the gap (`Sequence.num_pending`). A step may mix whole prompts, chunks of prompts, single
new tokens and recomputation after preemption.

Pure functions of this object's state and the events it is given: no clock, no I/O, no tensors.

A step may be planned while the one before is still under way, so that the device never waits for
the host. What a launched step computes counts as computed. Its new tokens are not known yet, but
it is known how many there are: a `PLACEHOLDER` stands in for one, and no step goes beyond a
sequence's ``max_tokens``. Whether a token ends its sequence is found out a step late: what the next
step computed for it then is dropped. It did no harm, since a sequence keeps its blocks until the
last step that uses them is committed. Tokens are appended and blocks published only by `commit`.

Why it never stalls: sequences have a total order (`ORDERS`), the running ones are kept in it, and
when blocks run out the last one goes back to wait. So the first always gets its blocks, because
the engine refuses a sequence that could not fit into an empty cache; it finishes, and then the
next one is first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ruvon.engine.blocks import extend_keys
from ruvon.engine.grouped_pool import GroupedPool
from ruvon.engine.policies import Policy, Rank, WaitingQueue
from ruvon.engine.types import (
    BEING_SAMPLED,
    NO_BLOCKS,
    Chunk,
    Emission,
    NewSequence,
    Plan,
    PooledRows,
    PromptRow,
    Sequence,
    StepResult,
    Tables,
    TokenLogprobs,
)

NOTHING_SAMPLED: tuple[tuple[int, ...], None] = ((), None)

STARTED_BLOCKS = 4096
"""Of sequences that start in one step while others run; more would hold these up for milliseconds,
as when all completions of a long prompt start."""


MOST_FORCED = 32
"""Of a stream's tokens that come before prompts: a grammar seldom forces more at once."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may hold, and who decides about it."""

    max_seqs: int
    max_tokens: int
    policy: Policy
    order: Callable[[Sequence], Rank]
    chunked: bool = True  # off: a prompt is computed in one step, alone if the budget is too small
    caching: bool = True  # look up and publish prefixes


@dataclass(slots=True)
class Counters:
    """Running totals since start."""

    steps: int = 0
    cached: int = 0  # prompt tokens found in the prefix cache
    queried: int = 0  # prompt tokens looked up there
    preempted: int = 0

    def since(self, earlier: Counters) -> Counters:
        return Counters(
            self.steps - earlier.steps,
            self.cached - earlier.cached,
            self.queried - earlier.queried,
            self.preempted - earlier.preempted,
        )


class Scheduler:
    """Owns the sequences and their blocks. Steps are committed in the order they were planned, and
    at most two are planned and not committed."""

    def __init__(self, grouped: GroupedPool, limits: Limits) -> None:
        self.grouped = grouped
        self.pool = grouped.pool
        self.limits = limits
        self.counters = Counters()
        self.waiting = WaitingQueue(limits.order)
        self.running: dict[int, Sequence] = {}  # by id, in the order of ``limits.order``
        self.sequences: dict[int, Sequence] = {}  # all of these, and those that end with a step
        self.num_with_grammar = 0  # of ``sequences``
        self._num_committed = 0  # steps
        self._full: list[Sequence] = []  # need new blocks for their next step
        self._computing: dict[bytes, int] = {}  # key of a block in the making → sequence id
        self._num_holding = 0  # running sequences that hold blocks
        self._startable = 0  # of this step's `STARTED_BLOCKS`
        self._ended: list[int] = []  # whom runners are to forget with the next plan
        self._held_up = False  # whether the last step left running streams out for a long prompt

    @property
    def has_work(self) -> bool:
        """Whether `schedule` has something to plan, now or after the next `commit`."""
        return bool(self.running) or len(self.waiting) > 0

    @property
    def num_in_flight(self) -> int:
        """Steps planned and not committed."""
        return self.counters.steps - self._num_committed

    def add(self, seq: Sequence) -> None:
        """Queue a sequence, which must fit into an empty cache."""
        needed = self.grouped.most_blocks(seq.num_prompt + seq.max_tokens)
        assert needed <= self.pool.num_blocks
        self.sequences[seq.id] = seq
        self.num_with_grammar += seq.sampling.grammar is not None
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

    # ------------------------------------------------------------------ schedule

    def schedule(self, now: float) -> Plan | None:
        """Plan one step, at the time ``now``; None if something must be committed first, or there
        is no work. Never None if there is work and nothing in flight."""
        self._startable = STARTED_BLOCKS
        self._full = [seq for seq in self._full if seq.finish is None]
        if self.num_in_flight and self._num_missing() > self.pool.num_free:
            return None
        if self._make_room() and self._start_followers():
            self._join()
        return self._plan(self._share_budget(), now)

    def _num_missing(self) -> int:
        """Blocks that running sequences need for their next steps."""
        if not self.grouped.slides:
            return len(self._full)
        return sum(
            [
                self.grouped.num_missing(
                    seq.tables, seq.num_computed, seq.num_computed + seq.num_pending
                )
                for seq in self._full
            ]
        )

    def _make_room(self) -> bool:
        """Let every running sequence hold blocks for its next step; False if some had to go.

        Nothing is in flight when one has to: its blocks could go to no other before the steps that
        use them are committed, so there is nothing to gain earlier, and its tokens would not all be
        known.
        """
        num_running = len(self.running)
        for seq in self._full:
            while seq.tables and not self._grow(seq):
                self._preempt(next(reversed(self.running.values())))
        self._full.clear()
        return len(self.running) == num_running

    def _grow(self, seq: Sequence) -> bool:
        """Take the blocks that a sequence needs for its next step, if there are any."""
        num_tokens = seq.num_computed + seq.num_pending
        blocks = self.grouped.grow(seq.tables, seq.num_computed, num_tokens)
        if blocks is None:
            return False
        if seq.added:
            blocks = tuple([old + new for old, new in zip(seq.added, blocks, strict=True)])
        seq.added = blocks if any(blocks) else NO_BLOCKS
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue. Its tokens stay, its cache is recomputed, or found if still there."""
        assert not seq.in_flight
        self._leave(seq)
        self.waiting.push(seq)
        if seq.tables:
            seq.num_preempted += 1
            self.counters.preempted += 1
        self._free(seq)
        if seq.prompt_logprobs is not None and len(seq.prompt_logprobs) < seq.num_prompt:
            seq.prompt_logprobs = [None]
        seq.pooled = None

    def _start_followers(self) -> bool:
        """Start those that waited for a prefix, if it is there by now; False if one of them lacks
        blocks: then nobody may join and overtake it."""
        if len(self.running) == self._num_holding:
            return True
        followers = [seq for seq in self.running.values() if not seq.tables]
        return all(self._start(seq) or seq.awaits in self._computing for seq in followers)

    def _join(self) -> None:
        """Let waiting sequences run, as many as the policy says and as there are blocks for."""
        num_joining = self.limits.policy(len(self.waiting), len(self.running), self.limits.max_seqs)
        num_joined = 0
        while num_joined < num_joining:
            seq = self.waiting.first()
            if not self._start(seq) and seq.awaits not in self._computing:
                break
            self.waiting.remove(seq)
            self.running[seq.id] = seq
            num_joined += 1
        if num_joined:
            by_rank = sorted(self.running.values(), key=self.limits.order)
            self.running = {seq.id: seq for seq in by_rank}

    def _start(self, seq: Sequence) -> bool:
        """Give a sequence its blocks: those the prefix cache has, and new ones for the rest.

        Not yet, if another sequence is computing a block of the same prefix right now: wait for
        it rather than compute it twice. Nor if the newcomer would leave less than one block for
        each running sequence to grow into, in each group that grows, and so be preempted soon. Nor
        if others with many blocks have started in this very step.
        """
        room_to_grow = self._num_holding * self.grouped.num_growing
        headroom = self.pool.num_free - room_to_grow
        if self._startable <= 0 and self._num_holding:
            return False
        if headroom <= 0 or seq.awaits in self._computing or self._is_blocked(seq, headroom):
            return False
        tables, num_found = self._find_prefix(seq)
        num_computed = num_found * self.pool.block_size
        num_new = self.grouped.num_missing(tables, num_computed, len(seq.tokens))
        is_short = num_new + room_to_grow > self.pool.num_free
        if seq.awaits is not None or is_short:
            self.grouped.release(tables)
            seq.headroom = headroom if is_short else -1
            return False
        seq.headroom = -1
        seq.num_published = num_found
        self.grouped.grow(tables, num_computed, len(seq.tokens))
        seq.tables = tables
        seq.added = tuple([tuple(table) for table in tables])
        self._startable -= sum(map(len, tables))
        self._num_holding += 1
        seq.num_computed = num_computed
        seq.num_pending = len(seq.tokens) - seq.num_computed
        self._claim(seq, seq.num_published)
        self._count_lookup(seq)
        return True

    def _is_blocked(self, seq: Sequence, headroom: int) -> bool:
        """Whether nothing has changed for the better since a sequence last found too few blocks:
        to look its prefix up again would be in vain."""
        return headroom <= seq.headroom and not self.grouped.has(seq.missing)

    def _find_prefix(self, seq: Sequence) -> tuple[Tables, int]:
        """Take hold of the published blocks its tokens start with, and see who makes the next: the
        tables, and how many blocks need not be computed."""
        num_shared = self._num_shared(seq)
        tables, num_found = self.grouped.match(self._keys_of(seq, num_shared))
        seq.missing = seq.keys[num_found] if num_found < num_shared else None
        seq.awaits = seq.missing if seq.missing in self._computing else None
        return tables, num_found

    def _keys_of(self, seq: Sequence, num_keys: int) -> Iterable[bytes]:
        """The keys of its first blocks; those not known are computed as they are asked for."""
        return (
            seq.keys[:num_keys] if len(seq.keys) >= num_keys else self._making_keys(seq, num_keys)
        )

    def _making_keys(self, seq: Sequence, num_keys: int) -> Iterator[bytes]:
        for i in range(num_keys):
            self._extend_keys(seq, i + 1)
            yield seq.keys[i]

    def _num_shared(self, seq: Sequence) -> int:
        """How many blocks it could share: full ones, and never the one with the last token, whose
        logits are wanted. None at all if it wants the logits of its whole prompt, or its hidden
        states."""
        if not self.limits.caching or self._wants_whole_prompt(seq):
            return 0
        return (len(seq.tokens) - 1) // self.pool.block_size

    def _extend_keys(self, seq: Sequence, num_keys: int) -> None:
        extend_keys(seq.keys, num_keys, seq.tokens, self.pool.block_size, seq.salt)

    def _claim(self, seq: Sequence, num_planned: int) -> None:
        """Tell others which blocks of a prompt are in the making: the planned ones and, so that
        nobody begins with it between two chunks, the one after them."""
        num_claimed = min(num_planned + 1, self._num_shared(seq))
        self._extend_keys(seq, num_claimed)
        for i in range(max(seq.num_claimed, seq.num_published), num_claimed):
            self._computing.setdefault(seq.keys[i], seq.id)
        seq.num_claimed = max(num_claimed, seq.num_claimed)

    def _count_lookup(self, seq: Sequence) -> None:
        """Count what the prefix cache gave, once for each sequence."""
        if seq.num_preempted or not self.limits.caching or self._wants_whole_prompt(seq):
            return
        seq.num_cached = seq.num_computed
        self.counters.cached += seq.num_cached
        self.counters.queried += seq.num_prompt

    def _share_budget(self) -> list[tuple[Sequence, int]]:
        """Who computes how many tokens: single tokens first, so that running streams go on
        smoothly, then prompts with what is left."""
        shares = [(seq, 1) for seq in self.running.values() if seq.num_pending == 1]
        del shares[self.limits.max_tokens :]
        num_single = len(shares)
        budget = self.limits.max_tokens - num_single
        held_up, self._held_up = self._held_up, False
        for seq in self._with_several():
            num_tokens = min(seq.num_pending, budget)
            if num_tokens < seq.num_pending and not self.limits.chunked:
                if len(shares) > num_single or held_up:
                    break
                # Beside nothing else, or it might never fit; then it is the others' turn.
                self._held_up = num_single > 0
                return [(seq, seq.num_pending)]
            if num_tokens == 0:
                break
            shares.append((seq, num_tokens))
            budget -= num_tokens
        return shares

    def _with_several(self) -> list[Sequence]:
        """Who has several tokens pending: streams first, for a grammar may force some tokens."""
        pending = [seq for seq in self.running.values() if seq.num_pending > 1]
        if self.num_with_grammar:
            pending.sort(key=lambda seq: seq.num_pending > MOST_FORCED)
        return pending

    def _plan(self, shares: list[tuple[Sequence, int]], now: float) -> Plan | None:
        """The step in which each sequence computes its share, if there is any."""
        if not shares:
            return None
        chunks: list[Chunk] = []
        new: list[NewSequence] = []
        prompt_rows: list[PromptRow] = []
        pooled_rows: list[PooledRows] = []
        for seq, num_tokens in shares:
            start = seq.num_computed
            blocks = seq.added
            if blocks:
                seq.added = NO_BLOCKS
            if num_tokens == 1 and start == len(seq.tokens):  # what most steps are made of
                chunks.append(Chunk(seq.id, seq.num_preempted, BEING_SAMPLED, start, blocks, True))
                self._advance(seq, 1)
                continue
            if not seq.introduced:
                new.append(self._introduce(seq))
            end = start + num_tokens
            if start < seq.num_prompt:
                prompt_rows += self._prompt_rows(seq, len(chunks), start, end)
                if seq.pooling is not None:
                    pooled_rows += self._pooled_rows(seq, len(chunks), start, end)
                self._claim(seq, end // self.pool.block_size)
                if seq.scheduled_at is None:
                    seq.scheduled_at = now
            samples = num_tokens == seq.num_pending and seq.max_tokens > 0
            tokens = tuple(seq.tokens[start:end])
            chunks.append(Chunk(seq.id, seq.num_preempted, tokens, start, blocks, samples))
            self._advance(seq, num_tokens)
        self.counters.steps += 1
        ended, self._ended = tuple(self._ended), []
        return Plan(
            self.counters.steps,
            tuple(chunks),
            tuple(new),
            ended,
            tuple(prompt_rows),
            tuple(pooled_rows),
        )

    @staticmethod
    def _introduce(seq: Sequence) -> NewSequence:
        seq.introduced = True
        prefix = tuple(seq.tokens[: seq.num_computed])
        return NewSequence(seq.id, seq.sampling, seq.num_prompt, seq.seed, prefix)

    def _advance(self, seq: Sequence, num_tokens: int) -> None:
        """Count a planned chunk as computed, and say what is pending then."""
        seq.in_flight += 1
        seq.num_computed += num_tokens
        seq.num_pending -= num_tokens
        if seq.num_pending:
            if self.grouped.slides:
                self._full.append(seq)
            return
        if seq.num_computed + 1 < seq.num_prompt + seq.max_tokens:
            seq.num_pending = 1  # the one being sampled
            if seq.num_computed % self.pool.block_size == 0:
                self._full.append(seq)
        else:  # the one being sampled is its last: somebody else may run
            self._leave(seq)

    def _prompt_rows(self, seq: Sequence, chunk: int, start: int, end: int) -> Iterable[PromptRow]:
        if self._wants_prompt_logprobs(seq) and start + 1 < seq.num_prompt:
            targets = tuple(seq.tokens[start + 1 : min(end + 1, seq.num_prompt)])
            yield PromptRow(seq.id, chunk, targets, seq.sampling.prompt_logprobs or 0)

    @staticmethod
    def _wants_prompt_logprobs(seq: Sequence) -> bool:
        return seq.prompt_logprobs is not None and len(seq.prompt_logprobs) < seq.num_prompt

    def _wants_whole_prompt(self, seq: Sequence) -> bool:
        return seq.pooling == "mean" or self._wants_prompt_logprobs(seq)

    @staticmethod
    def _pooled_rows(seq: Sequence, chunk: int, start: int, end: int) -> Iterable[PooledRows]:
        if seq.pooling == "mean":
            yield PooledRows(seq.id, chunk, 0, end - start)
        elif end == seq.num_prompt:
            yield PooledRows(seq.id, chunk, end - start - 1, 1)

    # ------------------------------------------------------------------ commit

    def commit(self, plan: Plan, result: StepResult) -> list[Emission]:
        """Take in what a step sampled: append tokens, publish blocks, finish sequences."""
        self._num_committed += 1
        assert plan.step == self._num_committed, "steps are committed in order"
        emissions, size, slides = [], self.pool.block_size, self.grouped.slides
        sampled = iter(zip(result.tokens, result.logprobs, strict=True))
        for chunk in plan.chunks:
            tokens, logprobs = next(sampled) if chunk.samples else NOTHING_SAMPLED
            seq = self.sequences[chunk.seq_id]
            seq.in_flight -= 1
            if seq.finish is not None:  # it ended while this step was under way
                self._end(seq)
                continue
            if seq.id in result.errors:
                emission: Emission | None = self._fail(seq, result.errors[seq.id])
            else:
                end = chunk.start + len(chunk.tokens)
                if end >= (seq.num_published + 1) * size and self.limits.caching:
                    self._publish(seq, end // size)
                if slides and end >= seq.leaves_at:
                    seq.leaves_at = self.grouped.leave(seq.tables, end)
                if seq.prompt_logprobs is not None:
                    seq.prompt_logprobs.extend(result.prompt_logprobs.get(seq.id, ()))
                if seq.id in result.pooled:
                    sum_C = result.pooled[seq.id]
                    seq.pooled = sum_C if seq.pooled is None else seq.pooled + sum_C
                emission = self._accept(seq, end, tokens, logprobs, seq.id in result.ended)
            if emission is not None:
                emissions.append(emission)
                if seq.finish is not None:
                    self._end(seq)
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

    @staticmethod
    def _fail(seq: Sequence, error: str) -> Emission:
        seq.finish = "error"
        return Emission(seq.id, seq.index, (), finish="error", error=error)

    def _publish(self, seq: Sequence, num_full: int) -> None:
        """Let others find a sequence's first ``num_full`` blocks."""
        self._extend_keys(seq, num_full)
        for i in range(seq.num_published, num_full):
            self.grouped.publish(seq.tables, i, seq.keys[i])
            self._computing.pop(seq.keys[i], None)
        seq.num_published = num_full

    def _accept(
        self,
        seq: Sequence,
        end: int,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] | None,
        ended: bool,
    ) -> Emission | None:
        """Append what was sampled after the first ``end`` tokens, up to what ends the sequence;
        None if there is no news of it. ``ended``: nothing may follow all of it.

        That no stop token comes before ``min_tokens`` is the sampler's doing: it masks them.
        """
        several = len(tokens) > 1
        if several:
            whole, tokens = tokens, self._cut(seq, end - seq.num_prompt, tokens)
            logprobs = logprobs and logprobs[: len(tokens)]
            ended = ended and tokens == whole
        seq.tokens += tokens
        num_output = end - seq.num_prompt + len(tokens)
        stopped = bool(tokens) and tokens[-1] in seq.stop_ids
        if stopped or ended:
            seq.finish = "stop"
        elif num_output >= seq.max_tokens:
            seq.finish = "length"
        elif not tokens:
            return None
        elif several:
            self._pend(seq, len(tokens) - 1)
        emission = Emission(
            seq.id, seq.index, tokens, logprobs, num_cached=seq.num_cached, finish=seq.finish
        )
        if stopped:
            emission.stop_token = tokens[-1]
        if seq.prompt_logprobs is not None and end == seq.num_prompt:
            emission.prompt_logprobs = tuple(seq.prompt_logprobs)
        emission.pooled = seq.pooled
        return emission

    @staticmethod
    def _cut(seq: Sequence, num_output: int, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Those of several tokens that the sequence may have: none beyond ``max_tokens``, none
        after a stop token."""
        tokens = tokens[: seq.max_tokens - num_output]
        stop = next((i for i, token in enumerate(tokens) if token in seq.stop_ids), len(tokens))
        return tokens[: stop + 1]

    def _pend(self, seq: Sequence, num_more: int) -> None:
        """More than the one token that was expected is to be computed. Nothing of the sequence is
        in flight: what follows the first of them could not have been planned."""
        assert not seq.in_flight
        seq.num_pending += num_more
        num_tokens = seq.num_computed + seq.num_pending
        missing = self.grouped.num_missing(seq.tables, seq.num_computed, num_tokens)
        if missing and seq not in self._full:
            self._full.append(seq)

    # ------------------------------------------------------------------ freeing

    def _leave(self, seq: Sequence) -> None:
        """A sequence runs no more, if it did; it keeps its blocks."""
        if self.running.pop(seq.id, None) is not None:
            self._num_holding -= bool(seq.tables)

    def _end(self, seq: Sequence) -> None:
        """A sequence is over, and nothing of it stays but its published blocks; not before its last
        step has been committed."""
        self._leave(seq)
        if not seq.in_flight:
            del self.sequences[seq.id]
            self.num_with_grammar -= seq.sampling.grammar is not None
            self._free(seq)

    def _free(self, seq: Sequence) -> None:
        """Give back a sequence's blocks, and its claim to be computing some."""
        for key in seq.keys[seq.num_published :]:
            if self._computing.get(key) == seq.id:
                del self._computing[key]
        self.grouped.release(seq.tables)
        if seq.introduced:
            self._ended.append(seq.id)
        seq.tables = ()
        seq.added = NO_BLOCKS
        seq.introduced = False
        seq.num_computed = 0
        seq.num_pending = 0
        seq.num_published = 0
        seq.leaves_at = 0
        seq.num_claimed = 0
        seq.awaits = None
