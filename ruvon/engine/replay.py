"""A recorded schedule again, without a model: the same calls to a scheduler of the same making, and
what comes of them beside what came of them then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ruvon.engine.blocks import KEY_BYTES, BlockPool, PoolState
from ruvon.engine.events import (
    AS_IT_IS,
    FORMAT,
    Aborted,
    Added,
    Beginning,
    Committed,
    Event,
    Failed,
    Forgotten,
    Header,
    Planned,
    Standing,
    Waited,
    planned,
)
from ruvon.engine.grouped_pool import GroupedPool, group_key
from ruvon.engine.policies import ORDERS, POLICIES, Limits
from ruvon.engine.scheduler import Scheduler
from ruvon.engine.snapshot import QueueState, Snapshot
from ruvon.engine.types import (
    Chunk,
    Plan,
    SamplingParams,
    Sequence,
    StepResult,
    TokenLogprobs,
)
from ruvon.errors import LoadError
from ruvon.grammars import Grammar

GOES_ON, STOPS = 0, 1  # in place of tokens
SCORE = TokenLogprobs(GOES_ON, 0.0, 0, ())
GRAMMAR = Grammar("")  # in place of one; a scheduler asks only whether there is one


Step = Planned | Waited | Committed | Failed
"""What a scheduler is asked for."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """One call, made again. ``difference`` is empty if all was as it was."""

    step: int
    event: Step
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_blocks: int
    difference: str = ""


def replay(events: Iterable[Header | Event]) -> Iterator[Replayed]:
    """Each plan and each commit again, up to the first difference. Raises LoadError for what is no
    recording that this version can read."""
    events = iter(events)
    header = next(events, None)
    if not isinstance(header, Header) or header.format != FORMAT:
        raise LoadError(f"this is no recording of format {FORMAT}")
    scheduler = make_scheduler(header)
    plans: dict[int, Plan] = {}  # in flight
    for event in events:
        if isinstance(event, Step):
            difference = again(scheduler, plans, event)
            yield replayed(scheduler, event, difference)
            if difference:
                return
        elif isinstance(event, Beginning):
            scheduler.restore(snapshot(event))
            plans = {each.step: plan(each) for each in event.in_flight}
        else:
            apply(scheduler, event)


def make_scheduler(header: Header) -> Scheduler:
    limits = Limits(
        max_seqs=header.max_seqs,
        max_tokens=header.max_tokens,
        policy=POLICIES[header.batching],
        order=ORDERS[header.scheduling_policy],
        chunked=header.chunked,
        caching=header.caching,
        stages=header.stages,
    )
    pool = BlockPool(header.num_blocks, header.block_size)
    return Scheduler(GroupedPool(pool, header.windows, header.longest_chunk), limits)


def apply(scheduler: Scheduler, event: Added | Aborted | Forgotten | Beginning | Header) -> None:
    """What happens between steps."""
    if isinstance(event, Added):
        scheduler.add(sequence(event))
    elif isinstance(event, Aborted):
        for seq_id in event.ids:
            scheduler.abort(seq_id)
    else:
        scheduler.pool.forget()


def sequence(added: Added) -> Sequence:
    """A sequence that a scheduler cannot tell from the recorded one."""
    return Sequence(
        id=added.id,
        index=added.index,
        sampling=SamplingParams(
            grammar=GRAMMAR if added.constrained else None,
            prompt_logprobs=0 if added.prompt_logprobs else None,
        ),
        tokens=[GOES_ON] * added.num_prompt,
        num_prompt=added.num_prompt,
        max_tokens=added.max_tokens,
        seed=0,
        stop_ids=frozenset({STOPS}),
        priority=added.priority,
        tenant=str(added.tenant),
        weight=added.weight,
        keys=[key(number) for number in added.keys],
        prompt_logprobs=[None] if added.prompt_logprobs else None,
        pooling=added.pooling,
    )


def snapshot(event: Beginning) -> Snapshot:
    """What the recorded scheduler was like, with numbers for keys and names."""
    return Snapshot(
        counters=event.counters,
        num_committed=event.num_committed,
        held_up=event.held_up,
        sequences=tuple([standing(each) for each in event.sequences]),
        queues=QueueState(
            waiting=event.waiting,
            running=event.running,
            full=event.full,
            ended=event.ended,
            computing={key(number): seq_id for number, seq_id in event.computing},
            served={str(tenant): served for tenant, served in event.served},
        ),
        pool=PoolState(
            event.blank,
            event.cached,
            {block: group_key(key(number), group) for block, number, group in event.keys},
        ),
    )


def standing(then: Standing) -> Sequence:
    """A sequence on its way."""
    seq = sequence(then.added)
    seq.tokens += [GOES_ON] * then.num_output
    if seq.prompt_logprobs is not None:
        seq.prompt_logprobs = [None] * then.num_scored
    for name in AS_IT_IS:
        setattr(seq, name, getattr(then, name))
    seq.missing = None if then.missing is None else key(then.missing)
    seq.awaits = None if then.awaits is None else key(then.awaits)
    seq.tables = tuple([list(table) for table in then.tables])
    seq.added = then.blocks
    return seq


def plan(then: Planned) -> Plan:
    """A plan of which a scheduler takes in the result."""
    chunks = [
        Chunk(seq_id, generation, (GOES_ON,) * count, start, blocks, samples)
        for seq_id, generation, start, count, samples, blocks in then.chunks
    ]
    return Plan(then.step, tuple(chunks))


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES)


def again(scheduler: Scheduler, plans: dict[int, Plan], event: Step) -> str:
    """Do what was done; how it came out differently, if it did."""
    if isinstance(event, Waited):
        made = scheduler.schedule(event.now)
        return "" if made is None else "then there was no step to plan, now there is one"
    if isinstance(event, Planned):
        made = scheduler.schedule(event.now)
        if made is None:
            return "then there was a step to plan, now there is none"
        plans[made.step] = made
        return difference(event, planned(made, event.now))
    if isinstance(event, Failed):
        scheduler.fail(plans.pop(event.step), "")
    else:
        scheduler.commit(plans.pop(event.step), result(event))
    then, now = event.finished, scheduler.finished
    return "" if now == then else f"finished were {then}, are {now}"


def result(event: Committed) -> StepResult:
    """A result that a scheduler cannot tell from the recorded one."""
    return StepResult(
        tokens=tuple(
            [
                (GOES_ON,) * (count - 1) + ((STOPS if stops else GOES_ON),) if count else ()
                for count, stops in event.rows
            ]
        ),
        logprobs=(None,) * len(event.rows),
        prompt_logprobs={seq_id: (SCORE,) * count for seq_id, count in event.scored.items()},
        errors=dict.fromkeys(event.errors, ""),
        ended=frozenset(event.ended),
    )


def difference(then: Planned, now: Planned) -> str:
    """The first thing in which two plans differ."""
    for name in ("step", "new", "ended", "prompt_rows", "pooled_rows"):
        before, after = getattr(then, name), getattr(now, name)
        if before != after:
            return f"{name} was {before}, is {after}"
    for number, (before, after) in enumerate(zip(then.chunks, now.chunks, strict=False)):
        if before != after:
            return f"chunk {number} was {before}, is {after}"
    if len(then.chunks) != len(now.chunks):
        return f"there were {len(then.chunks)} chunks, there are {len(now.chunks)}"
    return ""


def replayed(scheduler: Scheduler, event: Step, difference: str) -> Replayed:
    return Replayed(
        step=scheduler.counters.steps if isinstance(event, Waited) else event.step,
        event=event,
        num_running=len(scheduler.sequences) - len(scheduler.waiting),
        num_waiting=len(scheduler.waiting),
        num_free_blocks=scheduler.pool.num_free,
        num_blocks=scheduler.pool.num_blocks,
        difference=difference,
    )
