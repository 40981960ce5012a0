"""Whether new sequences may wait: bounds by their number and by their tokens, shared by tenants."""

from __future__ import annotations

from collections.abc import Collection

from ruvon.config import EngineConfig
from ruvon.engine.scheduler import Scheduler
from ruvon.engine.types import Job
from ruvon.errors import QueueFullError, RequestError


def most_live(config: EngineConfig) -> int:
    """Most live sequences: the queue's bound counts those beyond what could run at once."""
    return config.max_num_queued_reqs + config.largest_step.sequences


def check_room(jobs: Collection[Job], scheduler: Scheduler, config: EngineConfig) -> None:
    """Raise for jobs of one request that cannot wait now."""
    _check_sequences(jobs, scheduler, most_live(config))
    if config.max_num_queued_tokens is not None and len(scheduler.waiting):
        _check_tokens(jobs, scheduler, config.max_num_queued_tokens)


def _check_sequences(jobs: Collection[Job], scheduler: Scheduler, bound: int) -> None:
    num_new, num_waiting = sum(job.n for job in jobs), len(scheduler.waiting)
    if num_new > bound:
        raise RequestError(
            f"A request may hold at most {bound} completions here, not {num_new}.", "n"
        )
    excess = len(scheduler.running) + num_waiting + num_new - bound
    if excess > 0 and not _have_share(jobs, scheduler, bound, num_new, of_tokens=False):
        raise QueueFullError(
            f"The queue is full: {num_waiting} sequences are waiting.",
            "max_num_queued_reqs",
            excess,
        )


def _check_tokens(jobs: Collection[Job], scheduler: Scheduler, bound: int) -> None:
    """A request that is larger than the bound waits alone, or could never be served."""
    num_new, num_waiting = (
        sum(job.n * len(job.prompt) for job in jobs),
        scheduler.waiting.num_tokens,
    )
    excess = num_waiting + num_new - bound
    if excess > 0 and not _have_share(jobs, scheduler, bound, num_new, of_tokens=True):
        raise QueueFullError(
            f"The queue is full: {num_waiting} tokens are waiting.",
            "max_num_queued_tokens",
            excess,
        )


def _have_share(
    jobs: Collection[Job], scheduler: Scheduler, bound: int, num_new: int, *, of_tokens: bool
) -> bool:
    """Whether a tenant would have no more than its share of a bound: then others' requests cannot
    keep its own out. So the bound may be exceeded, by no more than the shares of those who come
    later."""
    shares = scheduler.shares
    if shares is None or not jobs:
        return False
    job = next(iter(jobs))
    there = scheduler.waiting.tokens_of(job.tenant) if of_tokens else shares.live(job.tenant)
    return there + num_new <= shares.of(bound, job.tenant, job.weight)
