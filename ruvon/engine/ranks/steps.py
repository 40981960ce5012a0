"""What ranks say of a step, and what it comes to: one result, a failure on which all agree, or the
end of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from ruvon.engine.types import StepResult
from ruvon.errors import RuvonError


class RankError(RuvonError):
    """A rank has died, or failed in a way that the others cannot go on from."""


class StepFailedError(RuvonError):
    """A step raised on one rank or more, and all of them are fit for the next."""


class Meetings(NamedTuple):
    """How often a rank met others during one step, once it was over for this rank."""

    collectives: int = 0  # with its stage: sums and gathers
    sent: int = 0  # to the next stage
    received: int = 0  # from the one before
    inside: bool = False  # whether it failed in the midst of one


class Report(NamedTuple):
    """What one rank says of a step that is over for it."""

    meetings: Meetings
    checksum: int = 0  # of the tokens it has sampled
    error: str | None = None


@dataclass(slots=True)
class Step:
    """A step under way, and what has been heard of it."""

    future: Future[StepResult]
    result: StepResult | None = None
    reports: dict[int, Report] = field(default_factory=dict)  # by rank
    failed_at: float | None = None  # when the first rank said so

    @property
    def failed(self) -> list[int]:
        """The ranks on which it raised."""
        return sorted(rank for rank, report in self.reports.items() if report.error is not None)

    def error(self) -> StepFailedError | None:
        """What it raised, of the first rank on which it did, with the tracebacks of all; None if it
        raised nowhere."""
        said = {rank: self.reports[rank].error or "" for rank in self.failed}
        if not said:
            return None
        rank, text = next(iter(said.items()))
        error = StepFailedError(f"rank {rank}: {text.partition(chr(10))[0]}")
        for rank, text in said.items():
            error.add_note(f"rank {rank}: {text.partition(chr(10))[2]}")
        return error


def why_parted(step: Step, size: int, *, after_failure: bool = False) -> str | None:
    """Why ranks, all of whose reports on a step are here, cannot go on together; None if they can.
    ``size`` ranks in a row are one stage.

    A step may have raised on some of them and not on others. What matters is that nobody waits for
    anybody, and that no message is left that the next step would take for its own: ranks of a stage
    have met equally often, and each stage has received what the one before has sent. And those that
    have sampled have sampled the same; but not right ``after_failure``: where the step before has
    failed, what it would have sampled is not known, and ranks compute different tokens of sequences
    that have failed with it.
    """
    reports = [step.reports[rank] for rank in range(len(step.reports))]
    for rank, (met, *_) in enumerate(reports):
        first = rank // size * size
        others, before = reports[first].meetings, reports[max(rank - size, 0)].meetings
        if met.inside:
            return f"rank {rank} failed while it met others"
        if met.collectives != others.collectives:
            return (
                f"rank {rank} met the others of its stage {met.collectives} times, and rank "
                f"{first} {others.collectives} times"
            )
        if rank >= size and met.received != before.sent:
            return f"rank {rank} has not received what rank {rank - size} has sent"
    return None if after_failure else why_unequal(reports, size)


def why_unequal(reports: Sequence[Report], size: int) -> str | None:
    """Which ranks of the last stage have sampled different tokens."""
    last = range(len(reports) - size, len(reports))
    fine = [rank for rank in last if reports[rank].error is None]
    for rank in fine:
        if reports[rank].checksum != reports[fine[0]].checksum:
            return f"rank {rank} has sampled other tokens than rank {fine[0]}"
    return None
