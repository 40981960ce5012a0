"""Does the same request give the same bytes? `ruvon verify` asks the loaded model.

A set of requests, greedy and drawn with seeds, short and long, is answered one at a time. Then it
is answered again in all ways that could make a difference (`CASES`), and every token and every
log-probability must be equal to the last bit. Weights are loaded once: a case is another engine,
with settings of its own, over the same runner and cache.

Kernels that are batch-invariant promise this, and a difference is an error. Of others the same
table says what happened to be equal.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, Literal, TypeAlias

from ruvon.config import EngineConfig
from ruvon.engine.engine import Engine, Pending
from ruvon.engine.startup import Started, start_engine
from ruvon.engine.types import Emission, Job, SamplingParams, TokenLogprobs
from ruvon.errors import ConfigError, RuvonError
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.tokenizer import Tokenizer
from ruvon.quality import Comparison, compare, open_scorer
from ruvon.telemetry import Progress, silent

LONGEST = 512
"""Tokens of the longest request, unless the model has fewer positions or blocks are large."""

TEXT = """\
A language model reads a text and says, for every word it knows, how likely that word comes next. \
To write, it draws one, adds it to the text, and reads on. A server does this for many people at \
once. Their texts have nothing to do with each other, but they share the machine: in one step the \
model reads the last word of thirty conversations and the first hundred words of a new one. What \
anybody gets must not depend on who else was there. That is harder than it sounds, for computers \
do not add exactly. The sum of a thousand small numbers comes out a little different when they are \
added in another order, and fast programs choose the order that suits the size of the batch. Most \
of the time nobody notices. But when two words are almost equally likely, the last digit decides \
between them, and from there on the two stories part. So the order is fixed here: each row of a \
matrix is summed by itself, from left to right in pieces of the same size, whether it came alone \
or with a crowd. Threads share out the rows, never the sums. A prompt may be read at a stroke, or \
in slices between other people's words; its beginning may be remembered from a minute ago; it may \
be put aside when memory is short and read again later. The answer stays the same, letter for \
letter, and so do the odds that the model gave to every letter. This program is the proof: it asks \
the same questions in every one of these ways, and compares."""


Requests: TypeAlias = Mapping[int, Job]
"""By number, from 0."""

Place: TypeAlias = Literal["output", "prompt"]


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


FEWEST = 8  # requests that make every case happen: two of them outgrow their block


@dataclass(slots=True)
class Answer:
    """What became of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # if asked for
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()  # if asked for

    def take(self, emission: Emission) -> None:
        if emission.error is not None:
            raise RuvonError(f"a request failed: {emission.error}")
        self.tokens += emission.tokens
        self.logprobs += emission.logprobs or ()
        self.prompt_logprobs = self.prompt_logprobs or emission.prompt_logprobs or ()


@dataclass(slots=True)
class Outcome:
    """Answers, and what happened on the way."""

    answers: dict[int, Answer]  # by request
    preempted: int = 0  # sequences
    cached: int = 0  # prompt tokens

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers.values())

    @property
    def fingerprint(self) -> str:
        """Stands for every bit of the answers: compare it between runs, builds and machines."""
        return hashlib.blake2b(repr(self.answers).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where an answer is not what it was alone."""

    request: int
    where: Place
    position: int
    expected: int | TokenLogprobs | None  # a token id; with log-probabilities if only they differ
    found: int | TokenLogprobs | None  # None where an answer ended before the other

    def describe(self, tokenizer: Tokenizer) -> str:
        place = f"request {self.request}, {self.where} position {self.position}"
        if isinstance(self.expected, TokenLogprobs) and isinstance(self.found, TokenLogprobs):
            token = spell(self.expected.token, tokenizer)
            return f"{place}: {token} in both, {contrast(self.expected, self.found)}"
        alone, here = spell(self.expected, tokenizer), spell(self.found, tokenizer)
        return f"{place}: {alone} alone, {here} here"


def contrast(one: TokenLogprobs, other: TokenLogprobs) -> str:
    """Where two positions with the same token differ, to the last digit."""
    if one.logprob != other.logprob:
        return f"log-probability {one.logprob!r} alone, {other.logprob!r} here"
    return f"alternatives {one.top} alone, {other.top} here"


def spell(value: int | TokenLogprobs | None, tokenizer: Tokenizer) -> str:
    """A token with its text."""
    if value is None:
        return "nothing"
    token = value.token if isinstance(value, TokenLogprobs) else value
    return f"token {token} {tokenizer.token_text(token)!r}"


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


# -------------------------------------------------------------------------------- requests


def make_jobs(tokenizer: Tokenizer, number: int, tokens: int, room: int, block: int) -> Requests:
    """Requests of all kinds, the same ones every time: prompts from one token to ``room``, at the
    edges of blocks too, some with a common beginning; answers of half, once and thrice ``tokens``.
    One that `outgrows` fills a block but for one token, so that its answer needs another.
    """
    ids = tokenizer.encode(TEXT)
    lengths = (1, 100, block, 3 * block - 2, room, block + 1, 7, 200, 50, 150, 33)
    jobs = {}
    for i in range(number):
        length = block - 1 if outgrows(i) else lengths[i % len(lengths)]
        output = tokens if outgrows(i) else (max(tokens // 2, 1), tokens, 3 * tokens)[i % 3]
        start = 0 if i % 3 == 1 else 13 * i % len(ids)
        text = ids[start:] + ids * (room // len(ids) + 1)
        prompt = tuple(text[: min(max(length, 1), room)])
        jobs[i] = Job(prompt, make_sampling(i, output), priority=7 * i % 5)
    return jobs


def outgrows(number: int) -> bool:
    """Whether this request begins in one block and soon needs another; one in five does."""
    return number % 5 == 2


def make_sampling(i: int, max_tokens: int) -> SamplingParams:
    """Greedy with and without logprobs, drawn with filters and with penalties, in turn."""
    common = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=i)
    match i % 4:
        case 0:
            return replace(common, temperature=0.0)
        case 1:
            return replace(common, temperature=0.0, logprobs=5, prompt_logprobs=1)
        case 2:
            return replace(common, temperature=0.8, top_p=0.95, logprobs=3)
        case _:
            drawn = replace(common, temperature=1.2, top_k=50, logprobs=0)
            return replace(drawn, repetition_penalty=1.2, presence_penalty=0.3)


# -------------------------------------------------------------------------------- answering


def answer(engine: Engine, jobs: Requests) -> Outcome:
    """All jobs at once."""
    outcome = Outcome({number: Answer() for number in jobs})
    for number, job in jobs.items():
        engine.add(job, time.monotonic(), number)
    pending: deque[Pending] = deque()
    while engine.has_work or pending:
        while (step := engine.launch(time.monotonic())) is not None:
            pending.append(step)
        for emission in engine.collect(pending.popleft()):
            outcome.answers[emission.index].take(emission)
        outcome.preempted += engine.stats.num_preempted
        outcome.cached += engine.stats.num_cached
    return outcome


def answer_alone(engine: Engine, jobs: Requests) -> Outcome:
    """One job after another."""
    single = [answer(engine, {number: job}).answers for number, job in jobs.items()]
    return Outcome({number: one for answers in single for number, one in answers.items()})


def run(case: Case, started: Started, jobs: Requests) -> Outcome:
    """Answer the jobs, of a crowded case some of them, in one way."""
    config, num_blocks = started.engine.config, started.memory.num_blocks
    settings = dict(case.settings)
    if case.crowded:
        jobs, num_blocks = crowd(jobs, config.block_size)
    budget = settings.get("max_num_batched_tokens", config.largest_step.tokens)
    settings.setdefault("max_num_seqs", min(config.largest_step.sequences, budget))
    engine = Engine(
        started.runner,
        replace(config, **settings),
        max_model_len=started.memory.max_model_len,
        num_blocks=num_blocks,
        vocab_size=started.engine.vocab_size,
        eos_token_ids=started.eos_token_ids,
    )
    for _ in range(case.rounds):
        outcome = answer_alone(engine, jobs) if case.alone else answer(engine, jobs)
    return outcome


def crowd(jobs: Requests, block_size: int) -> tuple[Requests, int]:
    """The requests that outgrow their block, and too few blocks for that: what the longest needs,
    but three, so that two may begin."""
    chosen = {number: job for number, job in jobs.items() if outgrows(number)}
    lengths = [len(job.prompt) + (job.sampling.max_tokens or 0) for job in chosen.values()]
    return chosen, max(-(-max(lengths) // block_size), 3)


def judge(case: Case, expected: Outcome, found: Outcome) -> Row:
    """Compare answers with those given alone."""
    happened = {"cached": found.cached, "preempted": found.preempted, None: True}[case.needs]
    return Row(
        case.name,
        found,
        find_difference(expected.answers, found.answers),
        None if happened else f"nothing was {case.needs}",
    )


def find_difference(
    expected: Mapping[int, Answer], found: Mapping[int, Answer]
) -> Difference | None:
    """The first one, tokens before log-probabilities within each request."""
    for number, other in found.items():
        one = expected[number]
        pairs: list[tuple[Place, Sequence[Any], Sequence[Any]]] = [
            ("output", one.tokens, other.tokens),
            ("output", one.logprobs, other.logprobs),
            ("prompt", one.prompt_logprobs, other.prompt_logprobs),
        ]
        for place, mine, theirs in pairs:
            for at, (a, b) in enumerate(zip_longest(mine, theirs)):
                if a != b:
                    return Difference(number, place, at, a, b)
    return None


# -------------------------------------------------------------------------------- the whole


@dataclass(slots=True)
class Report:
    """What was found out about one model on one table of kernels."""

    model: str
    tokenizer: Tokenizer
    device: str
    kernels: str
    dtype: str
    threads: int
    promised: bool  # whether these kernels promise equal bits
    rows: list[Row]  # the first has the answers that all others are compared with
    comparison: Comparison | None = None  # with plain torch in float32, if asked for

    @property
    def holds(self) -> bool:
        """Whether everything that is promised is so."""
        return not self.promised or all(row.equal for row in self.rows)


def verify(
    config: EngineConfig,
    number: int = 32,
    tokens: int = 16,
    *,
    reference: bool = True,
    progress: Progress = silent,
) -> Report:
    """Answer ``number`` requests of about ``tokens`` new tokens each in every way.

    ``reference`` compares the kernels with plain torch too, which takes 4 bytes a weight. What
    ``config`` says of batching, caching and the sizes of steps is what the cases vary, so it does
    not count. Raises ConfigError and LoadError as `start_engine` does.
    """
    config = engine_settings(config, number, progress)
    with closing(start_engine(config, progress)) as started:
        room = room_for_prompts(started.memory.max_model_len, tokens)
        jobs = make_jobs(started.tokenizer, number, tokens, room, started.memory.block_size)
        report = Report(
            model=started.checkpoint.name,
            tokenizer=started.tokenizer,
            device=started.device,
            kernels=started.kernels,
            dtype=started.dtype,
            threads=started.threads,
            promised=started.batch_invariant,
            rows=check_cases(started, jobs, progress),
        )
        text = started.tokenizer.encode(TEXT)[: started.memory.max_model_len]
    del started  # its weights too, before others are loaded
    report.rows += check_restarts(config, report, jobs, progress)
    if reference and report.kernels != "torch":
        report.comparison = compare_with_torch(config, text, progress)
    return report


def room_for_prompts(longest: int, tokens: int) -> int:
    """What the longest answers leave of the longest request."""
    if longest < 4 * tokens:
        raise ConfigError(f"--tokens: {longest} positions are too few for answers of {3 * tokens}")
    return longest - 3 * tokens


def engine_settings(config: EngineConfig, number: int, progress: Progress) -> EngineConfig:
    """A cache in which all requests fit, and steps in which the longest does."""
    positions = open_checkpoint(config, progress).spec.max_positions
    longest = min(max(LONGEST, 4 * config.block_size), positions)
    return replace(
        config,
        max_model_len=longest,
        max_num_seqs=number,
        max_num_batched_tokens=max(longest, number),
        max_num_queued_reqs=number,
        kv_cache_memory=None,
        enable_prefix_caching=False,
        enable_chunked_prefill=True,
        batching="continuous",
        scheduling_policy="fcfs",
        generation_config="none",
    )


def check_cases(started: Started, jobs: Requests, progress: Progress) -> list[Row]:
    """Everything that one loaded model can show."""
    rows: list[Row] = []
    for i, case in enumerate((ALONE, *CASES)):
        progress(case.name, i / (len(CASES) + 1))
        outcome = run(case, started, jobs)
        rows.append(judge(case, rows[0].outcome if rows else outcome, outcome))
    return rows


def check_restarts(
    config: EngineConfig, report: Report, jobs: Requests, progress: Progress
) -> list[Row]:
    """Loaded again: with other numbers of threads, and as it was."""
    teams = other_teams(report.threads) if report.device == "cpu" else []
    starts = [(Case(f"threads: {threads}"), threads) for threads in teams]
    rows = []
    for case, threads in (*starts, (Case("loaded again, alone", alone=True), config.threads)):
        with closing(start_engine(replace(config, threads=threads), progress)) as started:
            progress(case.name, 0.0)
            rows.append(judge(case, report.rows[0].outcome, run(case, started, jobs)))
    return rows


def other_teams(threads: int) -> list[int]:
    """Numbers of threads to compare with: one, and one fewer, which shares work out unevenly."""
    return sorted({1, threads - 1} - {0, threads}) or [2]


def compare_with_torch(config: EngineConfig, text: Sequence[int], progress: Progress) -> Comparison:
    """The kernels against the plain meaning of the same weights."""
    plain = replace(config, kernels="torch", dtype="float32", deterministic=False)
    with open_scorer(config, len(text), progress) as scorer:
        logits = scorer(text)
    with open_scorer(plain, len(text), progress) as scorer:
        return compare(scorer(text), logits, text)
