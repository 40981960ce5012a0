"""Engine: jobs in, emissions out, one step at a time.

A step is `launch`, which plans it and hands it to the runner, and `collect`, which takes in its
result; in between, the caller does what it likes, such as launching the next step, if the runner
is deep enough. No asyncio here: `loop` drives an engine for a server, `ruvon.llm` in a ``while``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import replace

from ruvon import __version__
from ruvon.config import EngineConfig
from ruvon.engine.blocks import BlockPool, PrefixCache
from ruvon.engine.events import FORMAT, Header
from ruvon.engine.grammar import Grammars
from ruvon.engine.grouped_pool import GroupedPool, longest_chunk, longest_that_fits
from ruvon.engine.jobs import Jobs
from ruvon.engine.live import Standing, stand
from ruvon.engine.policies import ORDERS, POLICIES, Limits
from ruvon.engine.preparation import Preparation
from ruvon.engine.queue_bounds import check_room, most_live
from ruvon.engine.recording import Recording
from ruvon.engine.scheduler import Scheduler
from ruvon.engine.steps import Counters, Pending, Runner
from ruvon.engine.types import (
    Emission,
    Endings,
    Job,
    Plan,
    Sequence,
    StepResult,
    StepStats,
)
from ruvon.errors import EngineDeadError

MOST_DESCRIBED = 16  # sequences
MOST_FAILURES = 5  # steps in a row, after which no further one is expected to succeed


class Engine:
    """Schedules sequences over one runner and one KV cache."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        max_model_len: int,
        num_blocks: int,
        windows: tuple[int, ...] = (0,),
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        grammars: Grammars | None = None,
    ) -> None:
        """``max_model_len`` is in tokens; it shrinks to what the whole cache can hold. ``windows``
        are those of the model's cache groups. Without ``grammars`` requests with one are refused;
        the runner has the same."""
        self._runner = runner
        self.config = config
        chunk = longest_chunk(config)
        self.max_model_len = longest_that_fits(
            num_blocks, max_model_len, config.block_size, windows, chunk
        )
        self.vocab_size = vocab_size
        limits = Limits(
            max_seqs=config.largest_step.sequences,
            max_tokens=config.largest_step.tokens,
            policy=POLICIES[config.batching],
            order=ORDERS[config.scheduling_policy],
            chunked=config.enable_chunked_prefill,
            caching=config.enable_prefix_caching,
            stages=config.pipeline_parallel_size,
        )
        pool = BlockPool(num_blocks, config.block_size)
        self._scheduler = Scheduler(GroupedPool(pool, windows, chunk), limits)
        self.recording: Recording | None = None
        self._jobs = Jobs(
            max_model_len=self.max_model_len,
            vocab_size=vocab_size,
            most_live=most_live(config),
            eos_token_ids=eos_token_ids,
            has_grammars=grammars is not None,
        )
        self.preparation = Preparation(self._jobs, config, grammars)
        self._counted = Counters()  # up to the latest launch
        self._num_launched = 0  # tokens of the latest step
        self._num_failures = 0  # steps that failed since one succeeded
        self.dead: Exception | None = None  # what it failed with when no step could succeed more
        self.failure: Exception | None = None  # why the step collected last failed, if it did
        self.stats = self._measure(0, 0, Counters(), 0.0)  # of the step collected last

    @property
    def has_work(self) -> bool:
        """Whether there is something to launch or to collect."""
        return bool(self._scheduler.sequences)

    def prepare(self, job: Job) -> Job:
        """As `Preparation.prepare`."""
        return self.preparation.prepare(job)

    def add(self, job: Job, now: float, first_index: int = 0) -> list[int]:
        """Queue a job's ``n`` sequences, whose emissions carry ``first_index`` and up. One with a
        grammar has been through `prepare`.

        Returns their ids. Raises, before anything is queued, `RequestError` for what can never
        run, `QueueFullError` for what cannot wait now and `EngineDeadError`.
        """
        self.check_alive()
        sequences = self._jobs.sequences(job, now, first_index)
        check_room([job], self._scheduler, self.config)
        for seq in sequences:
            self._scheduler.add(seq)
            if self.recording is not None:
                self.recording.added(seq)
        return [seq.id for seq in sequences]

    def sequence(self, seq_id: int) -> Sequence:
        """A live sequence, to read; `KeyError` when it is over."""
        return self._scheduler.sequences[seq_id]

    def place(self, seq: Sequence) -> int | None:
        """How many sequences a waiting one is behind, about; None for one that runs."""
        waiting = self._scheduler.waiting
        fair = ORDERS[self.config.scheduling_policy].fair
        return waiting.place(seq, fair) if seq in waiting else None

    def abort(self, seq_ids: Iterable[int]) -> None:
        """Drop sequences in whatever state; they emit nothing more. Unknown ids are ignored."""
        ids = tuple(seq_ids)
        if self.recording is not None:
            self.recording.aborted(ids)
        for seq_id in ids:
            self._scheduler.abort(seq_id)

    def launch(self, now: float) -> Pending | None:
        """Plan a step and start it; None if there is nothing to do, or nothing before a launched
        step has been collected."""
        scheduler = self._scheduler
        if not (scheduler.has_work and self._has_room()):
            return None
        plan = scheduler.schedule(now)
        if plan is None:
            if self.recording is not None:
                self.recording.waited(now)
            return None
        if self.recording is not None:
            self.recording.planned(plan, now)
        counted = scheduler.counters.since(self._counted)
        self._counted = replace(scheduler.counters)
        self._num_launched = plan.num_tokens
        started = self._start(plan)
        aside = scheduler.work, scheduler.not_started
        return Pending(plan, now, self._num_launched, started, counted, *aside)

    def _start(self, plan: Plan) -> Future[StepResult]:
        """The runner's future; a step that could not even be launched fails when it is collected,
        in its turn."""
        try:
            return self._runner.launch(plan)
        except Exception as error:
            future: Future[StepResult] = Future()
            future.set_exception(error)
            return future

    def _has_room(self) -> bool:
        """Whether the runner takes another step now."""
        num_in_flight, runner = self._scheduler.num_in_flight, self._runner
        return not num_in_flight or (
            num_in_flight < runner.depth
            and self._num_launched <= runner.long_step
            and (not self._scheduler.num_with_grammar or num_in_flight < runner.grammar_depth)
        )

    def collect(self, pending: Pending) -> list[Emission]:
        """Take in the result of the oldest launched step, waiting for it if need be.

        If it failed, its sequences end with ``finish="error"`` and `failure` says why. Raises
        EngineDeadError once no step can succeed any more.
        """
        self.check_alive()
        plan, seconds = pending.plan, 0.0
        result: StepResult | None = None
        try:
            result = pending.future.result()
        except Exception as error:
            emissions = self._take_failure(plan, error)
        else:
            emissions, seconds = self._scheduler.commit(plan, result), result.seconds
            self.failure, self._num_failures = None, 0
        if self.recording is not None:
            self.recording.committed(plan, result, self.finished)
        self.stats = self._measure(plan.step, pending.num_tokens, pending.counted, seconds)
        return emissions

    def _take_failure(self, plan: Plan, error: Exception) -> list[Emission]:
        self.failure = error
        self._num_failures += 1
        if self._runner.lost or self._num_failures == MOST_FAILURES:
            self.dead = error
        self.check_alive()
        return self._scheduler.fail(plan, f"The step that computed it failed{kind(error)}.")

    def record(
        self, pending: Iterable[Pending], most_steps: int, on_full: Callable[[], None]
    ) -> Recording:
        """Record what happens from here on, until `recording` is set to None. ``pending`` are the
        steps not collected yet; ``on_full`` is called after ``most_steps`` steps, or when it is
        large."""
        self.recording = Recording(
            self.header,
            self._scheduler.snapshot(),
            [step.plan for step in pending],
            self._scheduler.sequences.values(),
            most_steps,
            on_full,
        )
        return self.recording

    @property
    def header(self) -> Header:
        """What the engine was made of, as far as one has to know to follow what it does."""
        config, step = self.config, self.config.largest_step
        grouped = self._scheduler.grouped
        return Header(
            format=FORMAT,
            ruvon=__version__,
            block_size=config.block_size,
            num_blocks=grouped.pool.num_blocks,
            windows=grouped.windows,
            longest_chunk=longest_chunk(config),
            max_seqs=step.sequences,
            max_tokens=step.tokens,
            batching=config.batching,
            scheduling_policy=config.scheduling_policy,
            chunked=config.enable_chunked_prefill,
            caching=config.enable_prefix_caching,
            stages=config.pipeline_parallel_size,
        )

    @property
    def cached_blocks(self) -> list[int]:
        """Free blocks that can be found as a prefix, least recently used first."""
        return self._scheduler.pool.cached

    def stand(self, in_flight: Iterable[Plan], number: int, now: float) -> Standing:
        """How it stands before its recorder's event of that number, apart from the plans that are
        in flight."""
        return stand(self._scheduler, in_flight, number, now)

    def check_alive(self) -> None:
        """Raises EngineDeadError once no step can succeed any more."""
        if self.dead is not None:
            raise dead_error(self.dead) from self.dead

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running sequences keep what they hold."""
        self._scheduler.pool.forget()
        if self.recording is not None:
            self.recording.forgotten()

    def check(self, jobs: Collection[Job]) -> None:
        """Raise what `add` would, for a request of several jobs that are taken all or none."""
        check_room(jobs, self._scheduler, self.config)
        for job in jobs:
            self._jobs.validate(job)

    # ---------------------------------------------------------------- statistics

    @property
    def finished(self) -> Endings:
        """Who ended with the step collected last."""
        return self._scheduler.finished

    @property
    def load(self) -> tuple[int, int, float]:
        """At this moment: sequences running, sequences waiting, share of cache blocks in use."""
        pool, num_waiting = self._scheduler.pool, len(self._scheduler.waiting)
        used = 1 - pool.num_free / pool.num_blocks
        return len(self._scheduler.sequences) - num_waiting, num_waiting, used

    def describe(self) -> dict[str, object]:
        """What there is to do, for a log: numbers, and the first sequences."""
        scheduler = self._scheduler
        return {
            "steps": scheduler.counters.steps,
            "in_flight": scheduler.num_in_flight,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "free_blocks": scheduler.pool.num_free,
            "sequences": [
                f"{seq.id}: prompt {seq.num_prompt}, output {seq.num_output} of {seq.max_tokens},"
                f" computed {seq.num_computed}, pending {seq.num_pending},"
                f" preempted {seq.num_preempted}"
                for seq in list(scheduler.sequences.values())[:MOST_DESCRIBED]
            ],
        }

    @property
    def prefix_cache(self) -> PrefixCache:
        """At this moment: how large it is, and what it has lost."""
        return self._scheduler.pool.prefix_cache

    def _measure(self, step: int, num_tokens: int, counted: Counters, seconds: float) -> StepStats:
        scheduler = self._scheduler
        return StepStats(
            step=step,
            num_tokens=num_tokens,
            num_running=len(scheduler.sequences) - len(scheduler.waiting),
            num_waiting=len(scheduler.waiting),
            num_free_blocks=scheduler.pool.num_free,
            num_blocks=scheduler.pool.num_blocks,
            num_cached=counted.cached,
            num_queried=counted.queried,
            num_preempted=counted.preempted,
            seconds=seconds,
        )


def kind(error: BaseException) -> str:
    """What a client may know of an error of ours."""
    return f" ({type(error).__name__})"


def dead_error(cause: BaseException) -> EngineDeadError:
    """What is raised for whatever is asked of an engine after ``cause``."""
    return EngineDeadError(f"The engine has failed{kind(cause)}; the log says why.")
