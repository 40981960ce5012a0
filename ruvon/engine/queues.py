"""Who waits and who runs, and the blocks that the running ones hold.

Why it never stalls: sequences have a total order (`ORDERS`), the running ones are kept in it, and
when blocks run out the last one goes back to wait. So the first always gets its blocks, because
the engine refuses a sequence that could not fit into an empty cache; it finishes, and then the
next one is first. An order that is fair to tenants changes, but only with tokens that are computed
for the first time, and of these there is an end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ruvon.engine.grouped_pool import GroupedPool
from ruvon.engine.policies import Limits, Rank, Shares, WaitingQueue
from ruvon.engine.prefixes import Prefixes
from ruvon.engine.snapshot import QueueState
from ruvon.engine.steps import Counters
from ruvon.engine.types import NO_BLOCKS, NotStarted, Sequence, WaitReason
from ruvon.engine.waits import BLOCKS, PLACES, PREFIX, STEP, Waits

STARTED_BLOCKS = 4096
"""Of sequences that start in one step while others run; more would hold these up for milliseconds,
as when all completions of a long prompt start."""


class Queues:
    """The waiting and the running. ``counters`` are told what is found and who is preempted."""

    def __init__(self, grouped: GroupedPool, limits: Limits, counters: Counters) -> None:
        self.waiting = WaitingQueue(limits.order.rank)
        self.running: dict[int, Sequence] = {}  # by id, in the order of `rank`
        self.shares = Shares() if limits.order.fair else None
        self.prefixes = Prefixes(grouped, limits.caching)
        self.waits = Waits()
        self._grouped = grouped
        self._pool = grouped.pool
        self._limits = limits
        self._counters = counters
        self._full: list[Sequence] = []  # need new blocks for their next step
        self._num_holding = 0  # running sequences that hold blocks
        self._startable = 0  # of this step's `STARTED_BLOCKS`
        self._ended: list[int] = []  # whom runners are to forget with the next plan
        self.not_started: NotStarted = ()  # with the latest plan

    def fill(self, in_flight: int) -> bool:
        """Let the running hold blocks for their next step, and others join them. False, and all is
        as it was, if there are too few blocks as long as steps are ``in_flight``."""
        self.waits.reason = BLOCKS
        self._startable = STARTED_BLOCKS
        self._full = [seq for seq in self._full if seq.finish is None]
        if in_flight and self._num_missing() > self._pool.num_free:
            return False
        if self._is_contended:
            self._sort()
            if (seq := self._beyond_its_share()) is not None:
                if in_flight:
                    self.waits.reason = PLACES
                    return False
                self._preempt(seq)
        served = None
        if self._make_room() and self._start_followers():
            served = self._join()
        waits = len(self.waiting) > 0 or len(self.running) > self._num_holding
        self.not_started = self._find_not_started(served) if waits else ()
        return True

    @property
    def _is_contended(self) -> bool:
        """Whether tenants have to share."""
        return self.shares is not None and self.shares.contended

    def _beyond_its_share(self) -> Sequence | None:
        """Who has to go so that the next in line can run: that one finds no place or no blocks, and
        after that its tenant would have no more that run, by weight, than the other's. So nobody
        goes back and forth, and whoever has one that runs keeps one."""
        limits, num_running, num_waiting = self._limits, len(self.running), len(self.waiting)
        if not num_waiting or not limits.policy(num_waiting, num_running - 1, limits.max_seqs):
            return None
        first = self.waiting.first(self._served_soon())
        if num_running < limits.max_seqs and not self._is_blocked(first, self._headroom):
            return None
        counts = Counter([seq.tenant for seq in self.running.values()])
        its = (counts[first.tenant] + 1) / first.weight
        last_first = reversed(self.running.values())
        return next(
            (seq for seq in last_first if (counts[seq.tenant] - 1) / seq.weight >= its), None
        )

    @property
    def _headroom(self) -> int:
        """Free blocks but for one for each running sequence to grow into, in each group."""
        return self._pool.num_free - self._num_holding * self._grouped.num_growing

    def rank(self, seq: Sequence) -> tuple[float, Rank]:
        """What sorts the running sequences."""
        served = 0.0 if self.shares is None else self.shares.served(seq.tenant)
        return served, self._limits.order.rank(seq)

    def _sort(self) -> None:
        by_rank = sorted(self.running.values(), key=self.rank)
        self.running = {seq.id: seq for seq in by_rank}

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        """Count a planned chunk as computed, and say what is pending then."""
        seq.in_flight += 1
        seq.num_computed += num_tokens
        if self.shares is not None and self.shares.contended:
            self.shares.charge(seq, num_tokens)
        seq.num_pending -= num_tokens
        if seq.num_pending:
            if self._grouped.slides:
                self._full.append(seq)
            return
        if seq.num_computed + 1 < seq.num_prompt + seq.max_tokens:
            seq.num_pending = 1  # the one being sampled
            if seq.num_computed % self._pool.block_size == 0:
                self._full.append(seq)
        else:  # the one being sampled is its last: somebody else may run
            self.leave(seq)

    def pend(self, seq: Sequence, num_more: int) -> None:
        """More than the one token that was expected is to be computed. Nothing of the sequence is
        in flight: what follows the first of them could not have been planned."""
        assert not seq.in_flight
        seq.num_pending += num_more
        num_tokens = seq.num_computed + seq.num_pending
        missing = self._grouped.num_missing(seq.tables, seq.num_computed, num_tokens)
        if missing and seq not in self._full:
            self._full.append(seq)

    def leave(self, seq: Sequence) -> None:
        """A sequence runs no more, if it did; it keeps its blocks."""
        if self.running.pop(seq.id, None) is not None:
            self._num_holding -= bool(seq.tables)

    def free(self, seq: Sequence) -> None:
        """Give back a sequence's blocks, and its claim to be computing some."""
        self.prefixes.disclaim(seq)
        self._grouped.release(seq.tables)
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

    def take_ended(self) -> tuple[int, ...]:
        """Of sequences that a plan has named, those whose blocks were freed since the last call."""
        ended, self._ended = tuple(self._ended), []
        return ended

    def state(self) -> QueueState:
        """A copy that stays as it is."""
        return QueueState(
            waiting=tuple(self.waiting.ids()),
            running=tuple(self.running),
            full=tuple([seq.id for seq in self._full if seq.finish is None]),
            ended=tuple(self._ended),
            computing=dict(self.prefixes.computing),
            served={} if self.shares is None else self.shares.state(),
        )

    def restore(self, state: QueueState, sequences: Mapping[int, Sequence]) -> None:
        """Be in a state that queues with these sequences were in."""
        for seq_id in state.waiting:
            self.waiting.push(sequences[seq_id])
        self.running = {seq_id: sequences[seq_id] for seq_id in state.running}
        self._num_holding = sum(bool(seq.tables) for seq in self.running.values())
        self._full = [sequences[seq_id] for seq_id in state.full]
        self._ended = list(state.ended)
        self.prefixes.computing = dict(state.computing)
        if self.shares is not None:
            self.shares.restore(state.served, sequences.values())

    def _num_missing(self) -> int:
        """Blocks that running sequences need for their next steps."""
        if not self._grouped.slides:
            return len(self._full)
        return sum(
            [
                self._grouped.num_missing(
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
        blocks = self._grouped.grow(seq.tables, seq.num_computed, num_tokens)
        if blocks is None:
            return False
        if seq.added:
            blocks = tuple([old + new for old, new in zip(seq.added, blocks, strict=True)])
        seq.added = blocks if any(blocks) else NO_BLOCKS
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue. Its tokens stay, its cache is recomputed, or found if still there."""
        assert not seq.in_flight
        self.leave(seq)
        self.waiting.push(seq)
        if seq.tables:
            seq.num_served = max(seq.num_served, seq.num_computed)
            seq.num_preempted += 1
            self._counters.preempted += 1
        self.free(seq)
        if seq.lacks_prompt_logprobs:
            seq.prompt_logprobs = [None]
        seq.pooled = None

    def _start_followers(self) -> bool:
        """Start those that waited for a prefix, if it is there by now; False if one of them lacks
        blocks: then nobody may join and overtake it."""
        if len(self.running) == self._num_holding:
            return True
        followers = [seq for seq in self.running.values() if not seq.tables]
        return all(self._start(seq) or self.prefixes.is_computed(seq) for seq in followers)

    def _join(self) -> dict[str, float]:
        """Let waiting sequences run, as many as the policy says and as there are blocks for; by
        what each tenant will have been served then (`_served_soon`) the next one is chosen."""
        limits = self._limits
        num_joining = limits.policy(len(self.waiting), len(self.running), limits.max_seqs)
        served = self._served_soon()
        num_joined = 0
        while num_joined < num_joining:
            seq = self.waiting.first(served)
            if not self._start(seq) and not self.prefixes.is_computed(seq):
                self.waits.reason = BLOCKS if self._startable > 0 else STEP
                break
            self.waiting.remove(seq)
            self.running[seq.id] = seq
            self.waits.join(seq)
            num_joined += 1
            if served:
                served[seq.tenant] += (len(seq.tokens) - seq.num_computed) / seq.weight
        else:
            has_place = limits.policy(1, len(self.running), limits.max_seqs)
            self.waits.reason = STEP if has_place else PLACES
        if num_joined:
            self._sort()
        return served

    def _served_soon(self) -> dict[str, float]:
        """What each tenant will have been served once the prompts that run are computed: who joins
        first has no claim to all the places there are. Nothing where nobody has to share."""
        if not self._is_contended:
            return {}
        assert self.shares is not None
        served = self.shares.snapshot()
        for seq in self.running.values():
            served[seq.tenant] += seq.num_pending / seq.weight
        return served

    def _start(self, seq: Sequence) -> bool:
        """Give a sequence its blocks: those the prefix cache has, and new ones for the rest.

        Not yet, if another sequence is computing a block of the same prefix right now: wait for
        it rather than compute it twice. Nor if the newcomer would leave less than one block for
        each running sequence to grow into, in each group that grows, and so be preempted soon. Nor
        if others with many blocks have started in this very step.
        """
        headroom = self._headroom
        if self._startable <= 0 and self._num_holding:
            return False
        if headroom <= 0 or self.prefixes.is_computed(seq) or self._is_blocked(seq, headroom):
            return False
        tables, num_found = self.prefixes.find(seq)
        num_computed = num_found * self._pool.block_size
        num_new = self._grouped.num_missing(tables, num_computed, len(seq.tokens))
        is_short = num_new > self._headroom
        if seq.awaits is not None or is_short:
            self._grouped.release(tables)
            seq.headroom = headroom if is_short else -1
            return False
        seq.headroom = -1
        seq.num_published = num_found
        self._grouped.grow(tables, num_computed, len(seq.tokens))
        seq.tables = tables
        seq.added = tuple([tuple(table) for table in tables])
        self._startable -= sum(map(len, tables))
        self._num_holding += 1
        seq.num_computed = num_computed
        seq.num_pending = len(seq.tokens) - seq.num_computed
        self.prefixes.claim(seq, seq.num_published)
        self._count_lookup(seq)
        return True

    def _find_not_started(self, served: dict[str, float] | None) -> NotStarted:
        """Why those that run without blocks have none, and why the first that waits does not run;
        the others wait behind it. ``served`` is what `_join` gave, if it came to that."""
        makers, headroom = self.prefixes.computing, self._headroom
        found: list[tuple[int, WaitReason, int]] = []
        if len(self.running) > self._num_holding:
            followers = [seq for seq in self.running.values() if not seq.tables]
            found += [
                (seq.id, PREFIX, makers[seq.awaits])
                if seq.awaits in makers
                else (seq.id, BLOCKS, headroom)
                for seq in followers
            ]
        if len(self.waiting):
            first = self.waiting.first(self._served_soon() if served is None else served)
            reason = self.waits.reason
            found.append((first.id, reason, len(self.running) if reason == PLACES else headroom))
        return tuple(found)

    def _is_blocked(self, seq: Sequence, headroom: int) -> bool:
        """Whether nothing has changed for the better since a sequence last found too few blocks:
        to look its prefix up again would be in vain."""
        return headroom <= seq.headroom and not self._grouped.has(seq.missing)

    def _count_lookup(self, seq: Sequence) -> None:
        """Count what the prefix cache gave, once for each sequence."""
        if seq.num_preempted or not self.prefixes.looks_up(seq):
            return
        seq.num_cached = seq.num_computed
        self._counters.cached += seq.num_cached
        self._counters.queried += seq.num_prompt
