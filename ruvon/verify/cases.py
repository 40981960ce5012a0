"""The ways to answer: a case is another engine, with settings of its own, over the same runner and
cache."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ruvon.config import EngineConfig
from ruvon.engine.engine import Engine
from ruvon.engine.grouped_pool import longest_chunk, most_blocks
from ruvon.engine.startup import LoadedEngine
from ruvon.engine.steps import Pending
from ruvon.verify.answers import Answer, Difference, Outcome, find_difference
from ruvon.verify.requests import Requests, outgrows


@dataclass(frozen=True, slots=True)
class Case:
    """One way to answer all requests. ``settings`` are those of the engine; ``needs`` is what has
    to happen for the case to show anything."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False  # one request after another, not all at once
    rounds: int = 1  # how often the same engine is asked; the last answers count
    crowded: bool = False  # a few of them, in a cache that is too small
    needs: Literal["cached", "preempted"] | None = None


ALONE = Case("alone", alone=True)


CACHING = {"enable_prefix_caching": True}


CASES = (
    Case("alone, a second time", alone=True),
    Case("all at once"),
    Case("chunks, 7 tokens a step", {"max_num_batched_tokens": 7}),
    Case("chunks, 37 tokens a step", {"max_num_batched_tokens": 37}),
    Case("chunks, 200 tokens a step", {"max_num_batched_tokens": 200}),
    Case("prompts whole", {"enable_chunked_prefill": False}),
    Case("prefixes found in the cache", CACHING, rounds=2, needs="cached"),
    Case("preempted", crowded=True, needs="preempted"),
    Case("preempted, prefixes cached", CACHING, crowded=True, needs="preempted"),
    Case("batching sequential", {"batching": "sequential"}),
    Case("batching static", {"batching": "static", "max_num_seqs": 4}),
    Case("continuous, at most 4", {"max_num_seqs": 4}),
    Case("by priority", {"scheduling_policy": "priority", "max_num_seqs": 4}),
)


@dataclass(frozen=True, slots=True)
class Row:
    """What a case showed."""

    name: str
    outcome: Outcome
    difference: Difference | None
    missing: str | None = None  # what should have happened and did not

    @property
    def equal(self) -> bool:
        return self.difference is None and self.missing is None


def run(case: Case, loaded: LoadedEngine, jobs: Requests) -> Outcome:
    """Answer the jobs, of a crowded case some of them, in one way."""
    config, memory = loaded.engine.config, loaded.memory
    settings, num_blocks = dict(case.settings), memory.num_blocks
    if case.crowded:
        jobs, num_blocks = crowd(jobs, config, memory.windows)
    budget = settings.get("max_num_batched_tokens", config.largest_step.tokens)
    settings.setdefault("max_num_seqs", min(config.largest_step.sequences, budget))
    engine = Engine(
        loaded.runner,
        replace(config, **settings),
        max_model_len=memory.max_model_len,
        num_blocks=num_blocks,
        windows=memory.windows,
        vocab_size=loaded.engine.vocab_size,
        eos_token_ids=loaded.eos_token_ids,
    )
    for _ in range(case.rounds):
        outcome = answer_alone(engine, jobs) if case.alone else answer(engine, jobs)
    return outcome


def crowd(jobs: Requests, config: EngineConfig, windows: tuple[int, ...]) -> tuple[Requests, int]:
    """The requests that outgrow their block, and too few blocks for that: what the longest needs,
    but three in each cache group, so that two may begin."""
    chosen = {number: job for number, job in jobs.items() if outgrows(number)}
    lengths = [len(job.prompt) + (job.sampling.max_tokens or 0) for job in chosen.values()]
    needed = most_blocks(max(lengths), config.block_size, windows, longest_chunk(config))
    return chosen, max(needed, 3 * len(windows))


def answer(engine: Engine, jobs: Requests) -> Outcome:
    """All jobs at once."""
    outcome = Outcome({number: Answer() for number in jobs})
    for number, job in jobs.items():
        engine.add(job, time.monotonic(), number)
    pending: deque[Pending] = deque()
    while engine.has_work or pending:
        while (step := engine.launch(time.monotonic())) is not None:
            pending.append(step)
        emissions = engine.collect(pending.popleft())
        if engine.failure is not None:
            raise engine.failure
        for emission in emissions:
            outcome.answers[emission.index].take(emission)
        outcome.preempted += engine.stats.num_preempted
        outcome.cached += engine.stats.num_cached
    return outcome


def answer_alone(engine: Engine, jobs: Requests) -> Outcome:
    """One job after another."""
    single = [answer(engine, {number: job}).answers for number, job in jobs.items()]
    return Outcome({number: one for answers in single for number, one in answers.items()})


def judge(case: Case, expected: Outcome, found: Outcome) -> Row:
    """Compare answers with those given alone."""
    happened = {"cached": found.cached, "preempted": found.preempted, None: True}[case.needs]
    return Row(
        case.name,
        found,
        find_difference(expected.answers, found.answers),
        None if happened else f"nothing was {case.needs}",
    )
