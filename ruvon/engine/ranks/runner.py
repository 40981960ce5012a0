"""Ranks: a runner whose steps are computed by several processes together.

All of them are children of this one, which only plans and serves, so that no rank can hold up an
event loop. Each plan is sent to every rank as a value; the first rank of the last stage answers
with what the step has sampled, and all say when it is over for them. Only then is its future done:
ranks that go on from different states would part for good.

A rank that raises waits until it is known what the others did. If all are as far as each other,
that step has failed and nothing else; if not, or if a rank dies or does not answer, the engine
ends, and so do all ranks.
"""

from __future__ import annotations

import selectors
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from threading import Lock, Thread
from typing import TypeAlias

import orjson

from ruvon.engine.ranks.channel import Frame, Kind
from ruvon.engine.ranks.codec import decode_result, encode_plan, grammar_fields
from ruvon.engine.ranks.messages import REPORT, forward_log, read_failure, read_report, start_error
from ruvon.engine.ranks.nodes import NodeLink
from ruvon.engine.ranks.process import RankProcess, send_plan
from ruvon.engine.ranks.ring import NUMBER, PlanRing
from ruvon.engine.ranks.steps import RankError, Report, Step, why_parted
from ruvon.engine.types import Plan, StepResult
from ruvon.grammars import Grammar

PATIENCE = 10.0  # seconds for the steps under way when this closes
GRACE = 10.0  # seconds in which a step that failed on one rank must be over on all
PING_EVERY = 5.0  # seconds
MOST_MISSED = 6  # pings without an answer, after which a rank counts as hung

Link: TypeAlias = RankProcess | NodeLink
"""What leads to one rank of this machine, or to those of another."""


class Ranks:
    """Implements the engine's `Runner` protocol over processes that are ready.

    ``links`` lead to all of them, in the order of ranks; ``size`` are a stage. ``ready`` has, for
    each, how many steps it takes at once. ``held`` is kept as long as they live.
    """

    def __init__(
        self,
        links: Sequence[Link],
        ring: PlanRing,
        size: int,
        ready: Sequence[Mapping[str, int]],
        held: object = None,
    ) -> None:
        self.depth, self.grammar_depth, self.long_step = (
            min(said[name] for said in ready) for name in ("depth", "grammar_depth", "long_step")
        )
        stages = len(ready) // size
        if stages > 1:  # a step for each stage, and one that waits for the first
            self.depth = self.grammar_depth = stages + 1
            self.long_step = sys.maxsize
        self.failed: Future[None] = Future()
        """Gets why no step can succeed any more, if that ever happens."""
        self.num_failures = 0  # steps that raised, and that all have gone on from
        self._links = links
        self._link_of = {rank: link for link in links for rank in link.ranks}
        self._ring = ring
        self._held = held
        self._size = size
        self._number = 0  # of the plan sent last
        self._steps: dict[int, Step] = {}  # under way, oldest first
        self._error: Exception | None = None
        self._lock = Lock()  # for these three
        self._closing = False
        self._failed_last = -1  # the latest step that failed
        self._missed = dict.fromkeys(self._link_of, 0)  # pings
        self._pinged_at = time.monotonic()
        self._reader = Thread(target=self._read, name="ruvon-ranks", daemon=True)
        self._reader.start()

    @property
    def counters(self) -> dict[str, tuple[str, Callable[[], int]]]:
        """What a server tells of it: by name, help and value."""
        help = "Steps that failed on some rank, and from which all ranks have gone on."
        return {"rank_step_failures": (help, lambda: self.num_failures)}

    @property
    def lost(self) -> bool:
        """Whether the ranks are gone."""
        return self._error is not None

    @property
    def pids(self) -> list[int]:
        """The ranks' processes, of this machine."""
        return [link.process.pid for link in self._links if isinstance(link, RankProcess)]

    def launch(self, plan: Plan) -> Future[StepResult]:
        """Send a plan to all ranks. The future holds its result, or whatever went wrong."""
        future: Future[StepResult] = Future()
        future.set_running_or_notify_cancel()
        data = encode_plan(plan)
        with self._lock:
            if self._error is not None:
                future.set_exception(self._error)
                return future
            self._number += 1
            self._steps[self._number] = Step(future)
            self._send_plan(self._number, data)
        return future

    def announce(self, grammar: Grammar) -> None:
        """Let ranks that sample compile a grammar before a plan asks for it."""
        fields = grammar_fields(grammar)
        for link in self._links:
            if link.ranks[-1] >= len(self._link_of) - self._size:
                link.send(Kind.GRAMMAR, orjson.dumps(fields))

    def _send_plan(self, number: int, data: bytes) -> None:
        here = [link for link in self._links if not isinstance(link, NodeLink)]
        send_plan(number, data, self._ring, here)
        for link in self._links:
            if isinstance(link, NodeLink):
                link.send(Kind.WHOLE_PLAN, NUMBER.pack(number) + data)

    def close(self) -> None:
        """Finish what has been launched, and end the ranks."""
        patience = PATIENCE if self._error is None else 0.0
        self._closing = True
        for link in self._links:
            link.send(Kind.END)
        deadline = time.monotonic() + patience
        for link in self._links:
            link.end(max(deadline - time.monotonic(), 0.0))
        self._end(RuntimeError("the runner is closed"))
        self._reader.join()
        for link in self._links:
            link.close()
        self._ring.close()

    # ---------------------------------------------------------------- the reader's thread

    def _read(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                for link in self._links:
                    selector.register(link.channel, selectors.EVENT_READ, link)
                while self._error is None and selector.get_map():
                    for key, _ in selector.select(1.0):
                        if not self._take_all(key.data):
                            selector.unregister(key.fileobj)
                    self._look_after(time.monotonic())
        except Exception as error:  # whatever it is, no step may be waited for in vain
            self._lose("what a rank has said makes no sense", error)

    def _take_all(self, link: Link) -> bool:
        """Take in all that has come from there; False once nothing more will."""
        try:
            for frame in link.channel.available():
                self._missed[frame.rank] = 0
                self._take(frame.rank, frame)
        except EOFError:
            if not self._closing:
                self._lose(f"{link.name} {link.fate()}")
            return False
        return True

    def _take(self, rank: int, frame: Frame) -> None:
        if frame.kind == Kind.LOG:
            forward_log(rank, frame.json)
        elif frame.kind == Kind.FATAL:
            self._lose(f"rank {rank} has failed", start_error(rank, frame.json))
        elif frame.kind == Kind.GONE and not self._closing:
            self._lose(f"rank {rank} {frame.json}")
        elif frame.kind == Kind.FAILED:
            self._note(rank, *read_failure(frame.json))
        elif frame.kind in (Kind.RESULT, Kind.DONE):
            number, report = read_report(frame.payload)
            if frame.kind == Kind.RESULT and number in self._steps:
                self._steps[number].result = decode_result(frame.payload[REPORT.size :])
            self._note(rank, number, report)

    def _note(self, rank: int, number: int, report: Report) -> None:
        """Take in what a rank says of a step; once all have, that step is over."""
        step = self._steps.get(number)
        if step is None:  # nobody waits for it any more
            return
        step.reports[rank] = report
        if report.error is not None and step.failed_at is None:
            step.failed_at = time.monotonic()
        if len(step.reports) == len(self._link_of):
            self._settle(number, step)

    def _settle(self, number: int, step: Step) -> None:
        after_failure = self._failed_last == number - 1
        parted = why_parted(step, self._size, after_failure=after_failure)
        error = step.error()
        if parted is not None:
            self._lose(f"{parted} in step {number}", error)
            return
        with self._lock:
            self._steps.pop(number, None)
        if error is None:
            assert step.result is not None
            step.future.set_result(step.result)
            return
        self._failed_last = number
        self.num_failures += 1
        step.future.set_exception(error)
        for rank in step.failed:
            self._link_of[rank].send(Kind.RESUME, NUMBER.pack(number), rank=rank)

    def _look_after(self, now: float) -> None:
        """End what cannot go on: a step that has failed on one rank while others wait for it, and
        ranks that do not answer."""
        for number, step in list(self._steps.items()):
            if step.failed_at is not None and now - step.failed_at > GRACE:
                missing = sorted(self._link_of.keys() - step.reports.keys())
                names = ", ".join(f"rank {rank}" for rank in missing)
                self._lose(
                    f"{names} did not end step {number}, which failed elsewhere", step.error()
                )
        if now - self._pinged_at < PING_EVERY or self._closing:
            return
        self._pinged_at = now
        for rank in self._missed:
            if self._missed[rank] == MOST_MISSED:
                seconds = round(MOST_MISSED * PING_EVERY)
                self._lose(f"rank {rank} has not answered for {seconds} seconds")
            self._missed[rank] += 1
        for link in self._links:
            link.send(Kind.PING)

    def _lose(self, why: str, cause: Exception | None = None) -> None:
        """No step can succeed any more: fail those under way, and end all ranks."""
        error = RankError(why)
        error.__cause__ = cause
        for link in self._links:
            link.kill()
        self._end(error)
        if not self.failed.done():
            self.failed.set_exception(error)

    def _end(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error
            steps, self._steps = self._steps, {}
        for step in steps.values():
            step.future.set_exception(error)
