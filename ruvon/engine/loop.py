"""EngineLoop: the one task that runs the engine.

The loop waits for work, launches as many steps as the runner takes at once, lets the event loop
turn until the oldest is done, and hands its news to the streams (`ruvon.engine.stream`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import count

import structlog

from ruvon.engine.admission import MOST_ARRIVALS, Admission
from ruvon.engine.blocks import PrefixCache
from ruvon.engine.coalescing import Coalescer
from ruvon.engine.engine import Engine, dead_error
from ruvon.engine.gate import Gate
from ruvon.engine.observer import Observer
from ruvon.engine.open_requests import LoopMetrics, OpenRequests
from ruvon.engine.preparation import Preparation
from ruvon.engine.steps import Pending
from ruvon.engine.stream import Stream
from ruvon.engine.types import Emission, Job
from ruvon.errors import (
    DeadlineError,
    NotReadyError,
    QueueFullError,
    ShuttingDownError,
)

log = structlog.get_logger(__name__)

LAST_STEPS = 10.0  # seconds that steps under way get when the loop stops


class EngineLoop:
    """Runs an engine in one asyncio task. Everything here happens on the event loop's thread."""

    def __init__(
        self,
        engine: Engine,
        metrics: LoopMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.dead: BaseException | None = None  # what killed the loop
        self.draining = False
        self.progressed_at = clock()  # when a step was last collected, or work last began
        self.gate = Gate(clock)
        self._metrics = metrics
        self._clock = clock
        self._requests = OpenRequests(metrics)
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self._numbers = count()  # of streams
        self._pending: deque[Pending] = deque()  # launched steps, oldest first
        self.observer = Observer(engine, self._pending, clock)
        self._coalescer = Coalescer()
        self._admission = Admission(lambda: bool(self._pending) and self._pending[0].future.done())

    # ---------------------------------------------------------------- life

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.engine.vocab_size

    @property
    def load(self) -> tuple[int, int, float]:
        """At this moment: sequences running, sequences waiting, share of cache blocks in use."""
        return self.engine.load

    @property
    def prefix_cache(self) -> PrefixCache:
        """At this moment: how large it is, and what it has lost."""
        return self.engine.prefix_cache

    @property
    def preparation(self) -> Preparation:
        """What is done for a job before `generate`."""
        return self.engine.preparation

    @property
    def num_open(self) -> int:
        """Sequences whose end somebody waits for."""
        return len(self._requests)

    @property
    def num_arriving(self) -> int:
        """Requests that `admission` lets wait."""
        return self._admission.num_waiting

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self._task is not None and self.dead is None and not self.draining

    @property
    def stalled_for(self) -> float:
        """Seconds since the last progress, 0 without work: a large number means a stuck step."""
        return self._clock() - self.progressed_at if self._requests else 0.0

    def start(self) -> None:
        """Begin to take and run requests; call on the event loop."""
        self._task = asyncio.create_task(self._run(), name="engine-loop")

    def watch(self, failed: Future[None]) -> None:
        """Fail as soon as ``failed`` says why no step can succeed any more, though none may be
        under way. Call on the event loop."""
        loop = asyncio.get_running_loop()

        def tell(failed: Future[None]) -> None:
            error = failed.exception() or RuntimeError("nothing computes any more")
            with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(self.fail, error)

        failed.add_done_callback(tell)

    async def stop(self, timeout: float, patience: float = LAST_STEPS) -> None:
        """Refuse new requests, give the running ones ``timeout`` seconds, abort the rest, end.

        Aborted sequences emit a last ``finish="abort"``. Steps under way then get ``patience``
        seconds; after that they count as stuck, and nobody waits for them.
        """
        self.draining = True
        self.gate.open()
        if self._task is None:
            return
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            self._abort_all()
        self._work.set()
        done, _ = await asyncio.wait([self._task], timeout=patience)
        if not done:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._die(TimeoutError(f"a step takes more than {patience:g} seconds"))

    # ---------------------------------------------------------------- requests

    async def admission(self, tenant: str = "") -> None:
        """Wait until reading a new request keeps no step waiting; then make haste."""
        await self._admission.enter(tenant)

    def generate(self, jobs: Sequence[Job], timeout: float | None = None) -> Stream:
        """Queue all jobs, or none and raise: `RequestError` for what can never run,
        `QueueFullError` with the time to wait, `NotReadyError`, `EngineDeadError`.

        An emission's index counts over all jobs' completions. After ``timeout`` seconds, in the
        queue or not, the stream ends with a `DeadlineError`.
        """
        self._check_ready()
        now = self._clock()
        try:
            self.engine.check(jobs)
        except QueueFullError as error:
            error.retry_after = self._requests.drain.seconds_for(error, now)
            raise
        stream = Stream(self._end, next(self._numbers))
        if timeout is not None:
            stream.expire(timeout, lambda: self._deadline_error(stream))
        for job in jobs:
            self._admit(job, stream, now)
        if not self._work.is_set():
            self.progressed_at = now
            self._work.set()
        return stream

    def _check_ready(self) -> None:
        if self.dead is not None:
            raise dead_error(self.dead) from self.dead
        if self.draining:
            raise ShuttingDownError("The server is shutting down.")
        if self._task is None:
            raise NotReadyError("The engine has not started.")

    def _deadline_error(self, stream: Stream) -> DeadlineError:
        """What is said of a stream whose time is up."""
        num_output = sum(seq.num_output for seq in self._requests.sequences(stream.open))
        done = f"{num_output} tokens generated" if num_output else self.progress(stream)
        return DeadlineError(f"The request's time is up ({done}).")

    def progress(self, stream: Stream) -> str:
        """What a stream without news waits for: ``queued 3`` behind so many sequences, or the share
        of its prompt that is computed, ``prefill 512/4096``. Nothing once it has tokens."""
        sequences = self._requests.sequences(sorted(stream.open))
        if not sequences or any(seq.num_output for seq in sequences):
            return ""
        places = [self.engine.place(seq) for seq in sequences]
        if None not in places:
            return f"queued {places[0]}"
        seq = sequences[places.index(None)]
        return f"prefill {min(seq.num_computed, seq.num_prompt)}/{seq.num_prompt}"

    def _admit(self, job: Job, stream: Stream, now: float) -> None:
        seq_ids = self.engine.add(job, now, first_index=len(stream.open))
        for seq_id in seq_ids:
            self._requests.open(self.engine.sequence(seq_id), stream, job.n)
        self._idle.clear()
        max_tokens = self.engine.sequence(seq_ids[0]).max_tokens
        self.observer.recorder.arrived(now, seq_ids, len(job.prompt), max_tokens)

    def _end(self, stream: Stream, seq_ids: Iterable[int], reason: str) -> None:
        """A reader wants no more of these unfinished sequences, or has waited long enough."""
        now = self._clock()
        self.engine.abort(seq_ids)
        self.observer.recorder.aborted(now, seq_ids)
        for seq_id in seq_ids:
            self._requests.close(seq_id, reason, now)
        self._note_idle()

    def _abort_all(self) -> None:
        """Time is up: tell every stream that its sequences were cut short."""
        self.engine.abort(self._requests)
        self.observer.recorder.aborted(self._clock(), self._requests)
        emissions = [
            Emission(seq.id, seq.index, (), num_cached=seq.num_cached, finish="abort")
            for seq in self._requests.sequences()
        ]
        self._deliver(emissions, self._clock())
        self._coalescer.end_step()

    def _note_idle(self) -> None:
        if not self._requests:
            self._idle.set()

    # ---------------------------------------------------------------- the task

    async def _run(self) -> None:
        try:
            while self._pending or self._requests or not self.draining:
                if not self._pending and self.engine.has_work:
                    await self._pass_gate()
                while (self.gate.is_open or not self._pending) and (
                    step := self.engine.launch(self._clock())
                ) is not None:
                    self._pending.append(step)
                if self._pending:
                    await self._finish(self._pending[0])
                else:
                    self._admission.admit_all()
                    self._work.clear()
                    await self._work.wait()
        except Exception as error:  # whatever it is, no stream may wait for ever
            self._die(self.engine.dead or error)
        finally:
            self._pending.clear()
            self._admission.admit_all()

    async def _pass_gate(self) -> None:
        """Wait for the next step's turn, if somebody wants to see the steps one by one."""
        if not self.gate.is_open:
            self._admission.admit_all()
            await self.gate.wait(self._progress)

    async def _finish(self, pending: Pending) -> None:
        await asyncio.sleep(0)  # a turn for readers and arrivals
        behind = pending.future.done()
        if not behind:
            self._admission.admit_meanwhile()
            with suppress(Exception):  # `collect` knows what it means
                await asyncio.wrap_future(pending.future)
        emissions = self.engine.collect(pending)
        self._pending.popleft()
        now = self._progress()
        self._record_step(pending, now)
        self._coalescer.begin_step(behind, len(self._requests))
        self._deliver(emissions, now)
        self._coalescer.end_step()
        if self.engine.failure is not None:  # said last: nobody's news wait for a log
            log.error("step_failed", sequences=len(emissions), exc_info=self.engine.failure)
        self._admission.admit(MOST_ARRIVALS)

    def _progress(self) -> float:
        """Note that nothing is stuck; the time."""
        self.progressed_at = self._clock()
        return self.progressed_at

    def _deliver(self, emissions: Sequence[Emission], now: float) -> None:
        """One pass over a step's emissions."""
        for emission in emissions:
            stream, urgent = self._requests.take(emission, now)
            stream.put(emission)
            self._coalescer.add(stream, urgent)
        self._requests.end_step(now)
        self._note_idle()

    def describe(self) -> Mapping[str, object]:
        """What the engine is doing, for a log; may be called in any thread."""
        under_way = [
            f"step {step.plan.step}: {step.num_tokens} tokens of {len(step.plan.chunks)} sequences"
            for step in list(self._pending)
        ]
        return {"open": len(self._requests), "under_way": under_way, **self.engine.describe()}

    def fail(self, error: BaseException) -> None:
        """Fail whatever runs or waits, and take nothing more."""
        if self.dead is None:
            self.engine.abort(self._requests)
            self._die(error)

    def _die(self, error: BaseException) -> None:
        if self.dead is not None:
            return
        self.dead = error
        for stream in self._requests.streams():
            stream.fail(dead_error(error))
        self._requests.clear()
        self._note_idle()
        log.error("engine_dead", exc_info=error)  # last: whatever comes of it, all have been told

    # ---------------------------------------------------------------- metrics

    def _record_step(self, pending: Pending, now: float) -> None:
        self.observer.stepped(pending, now)
        stats = self.engine.stats
        self._metrics.record_step(
            num_tokens=stats.num_tokens,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_usage=1 - stats.num_free_blocks / stats.num_blocks,
            num_cached=stats.num_cached,
            num_queried=stats.num_queried,
            num_preempted=stats.num_preempted,
        )
