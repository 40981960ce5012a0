"""A step that has been launched, and what an engine asks of whatever computes it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from ruvon.engine.types import NotStarted, Plan, StepResult, Work


class Runner(Protocol):
    """Computes plans; the future resolves when the step's tokens are known."""

    @property
    def depth(self) -> int:
        """How many steps may be launched and not collected: 1, or 2 with `PLACEHOLDER`s; more where
        steps go through several stages, without."""

    @property
    def grammar_depth(self) -> int:
        """The same as long as there is a sequence with a grammar: 1 if forced tokens come along
        with the one that forces them, for how many is known when a step is over."""

    @property
    def long_step(self) -> int:
        """Behind a step of more tokens than this no other is launched until it is collected: it
        would gain little, and whoever arrives meanwhile would miss it."""

    @property
    def lost(self) -> bool:
        """Whether no step can succeed any more. Asked after one has failed."""

    def launch(self, plan: Plan) -> Future[StepResult]:
        """Start computing. Plans are computed in the order they are launched, and one that fails
        leaves the runner fit for the next, unless it is `lost`."""


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


@dataclass(frozen=True, slots=True)
class Pending:
    """A step that has been launched. ``future`` is ready when `Engine.collect` will not block."""

    plan: Plan
    at: float  # when it was planned; seconds, monotonic
    num_tokens: int
    future: Future[StepResult]
    counted: Counters  # by this step's planning
    work: list[Work]  # of the plan
    not_started: NotStarted  # with it
