"""The property of this project: whatever the policy, the chunking, the cache pressure or what
else is running, and whether a step is launched before the one before is collected, a request gets
the same tokens; and in the end every block is free."""

from __future__ import annotations

import atexit
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from fakes import ByteTokenizer, FakeRunner, allowed, last_three
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvon import grammars
from ruvon.config import EngineConfig
from ruvon.engine.blocks import NULL
from ruvon.engine.engine import Engine
from ruvon.engine.events import read
from ruvon.engine.grammar import Grammars
from ruvon.engine.grouped_pool import longest_chunk, most_blocks
from ruvon.engine.jobs import completion_seeds
from ruvon.engine.matching import Matchers
from ruvon.engine.ranks.codec import decode_plan, decode_result, encode_plan, encode_result
from ruvon.engine.recording import Recording
from ruvon.engine.replay import replay as recorded_again
from ruvon.engine.steps import Pending
from ruvon.engine.types import Emission, Job, Plan, SamplingParams, StepResult

ALPHABET = (*range(97, 97 + 11), *ByteTokenizer.eos_ids)  # small: sequences do stop by themselves
MAX_MODEL_LEN = 60
GRAMMARS = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size, ByteTokenizer.eos_ids)
atexit.register(GRAMMARS.close)
RULES = (
    grammars.regex("[a-k]{2}(bcd|e+f)*"),
    grammars.choice(["abcdefghij", "abd", "k"]),
    grammars.json_schema({"type": "object", "properties": {"long name": {"type": "integer"}}}),
    grammars.lark('start: "a" b*\nb: "c" b "d" | /[e-g]/'),
)
"""Of which some force tokens, some end by themselves and some never."""


def stop_ids(job: Job) -> set[int]:
    return {*job.sampling.stop_token_ids} | (
        set() if job.sampling.ignore_eos else {*ByteTokenizer.eos_ids}
    )


def expected(job: Job, seed: int) -> tuple[list[int], str]:
    """What a request must emit and how it ends, from the definition alone."""
    tokens, wanted = list(job.prompt), job.sampling
    room = MAX_MODEL_LEN - len(tokens)
    most = room if wanted.max_tokens is None else wanted.max_tokens
    output: list[int] = []
    matcher = wanted.grammar and GRAMMARS.matcher(wanted.grammar)
    while len(output) < most:
        alphabet = ALPHABET
        if matcher:
            alphabet = allowed(np.frombuffer(matcher.compute_bitmask(), dtype=np.int32))
            if wanted.ignore_eos:
                alphabet = [t for t in alphabet if t not in ByteTokenizer.eos_ids] or alphabet
        new = [alphabet[last_three(tokens, seed if wanted.temperature > 0 else 0) % len(alphabet)]]
        if matcher:
            assert matcher.consume_token(new[0])
            if wanted.logprobs is None:
                new += matcher.compute_ff_tokens()
                assert matcher.consume_tokens(new[1:])
        for token in new[: most - len(output)]:
            output.append(token)
            tokens.append(token)
            if token in stop_ids(job):
                return output, "stop"
        if matcher and matcher.is_stopped() and tokens[-len(new) :] == new:
            return output, "stop"
    return output, "length"


@dataclass
class Arrival:
    """A job, the step before which it arrives, and the step before which it is aborted."""

    job: Job
    at: int
    aborted_at: int | None = None


def make_matchers(grammar_depth: int) -> Matchers:
    return Matchers(GRAMMARS, at_once=grammar_depth == 1)


class Run:
    """One engine fed with arrivals, its invariants checked after every step.

    Of two steps under way, the first is computed when it is collected, or, if ``eager``, both are
    at once.
    """

    def __init__(
        self,
        arrivals: list[Arrival],
        num_blocks: int,
        config: EngineConfig,
        depth: int = 1,
        grammar_depth: int = 1,
        eager: bool = False,
        at_once: int = 1,
        failing: Mapping[int, str] = MappingProxyType({}),
        windows: tuple[int, ...] = (0,),
        record_from: int = 0,
    ) -> None:
        self.runner = FakeRunner(
            config.block_size, ALPHABET, by_hand=not eager, depth=depth, at_once=at_once,
            grammar_depth=grammar_depth, matchers=make_matchers(grammar_depth), windows=windows,
        )  # fmt: skip
        self.runner.failing |= failing
        self.engine = Engine(
            self.runner,
            config,
            max_model_len=MAX_MODEL_LEN,
            num_blocks=num_blocks,
            windows=windows,
            vocab_size=ByteTokenizer.vocab_size,
            eos_token_ids=ByteTokenizer.eos_ids,
            grammars=GRAMMARS,
        )
        self.record_from = record_from
        self.recording: Recording | None = None
        self.arrivals = arrivals
        self.ids: dict[int, list[int]] = {}
        self.outputs: dict[int, list[int]] = {}
        self.scored: dict[int, list[int | None]] = {}  # the tokens that prompt logprobs are of
        self.finished: dict[int, str] = {}
        self.pending: deque[Pending] = deque()
        self.results: list[StepResult] = []
        self.step = 0

    def go(self, most_steps: int = 20_000) -> Run:
        while self.engine.has_work or self.step <= max((a.at for a in self.arrivals), default=0):
            assert self.step < most_steps, "no end in sight"
            self._arrive()
            self._abort(self.step)
            self._step()
            self.step += 1
        self.runner.close()
        return self

    def _arrive(self) -> None:
        for number, arrival in enumerate(self.arrivals):
            if arrival.at == self.step:
                self.ids[number] = self.engine.add(arrival.job, 0.0)
                self.outputs |= {seq_id: [] for seq_id in self.ids[number]}

    def _abort(self, moment: float) -> None:
        for number, arrival in enumerate(self.arrivals):
            if arrival.aborted_at == moment and number in self.ids:
                self.engine.abort(self.ids[number])

    def _step(self) -> None:
        if self.step == self.record_from:
            self.recording = self.engine.record(self.pending, 100_000, lambda: None)
        while (pending := self.engine.launch(0.0)) is not None:
            self._check_plan(pending.plan)
            self.pending.append(pending)
        check(self.engine)
        self._abort(self.step + 0.5)  # in flight
        if not self.pending:
            return
        if not self.pending[0].future.done():
            self.runner.finish_step()
        if self.pending[0].future.exception() is None:
            self.results.append(self.pending[0].future.result())
        for emission in self.engine.collect(self.pending.popleft()):
            self._take_in(emission)
        if not isinstance(self.engine.failure, ArithmeticError | None):  # the runner's own
            raise self.engine.failure
        check(self.engine)

    def _check_plan(self, plan: Plan) -> None:
        assert self.finished.keys().isdisjoint(chunk.seq_id for chunk in plan.chunks)
        limit = self.engine.config.largest_step.tokens
        assert plan.num_tokens > 0
        assert plan.num_tokens <= limit
        assert len(plan.chunks) <= self.engine.config.largest_step.sequences

    def _take_in(self, emission: Emission) -> None:
        assert emission.seq_id not in self.finished
        if emission.prompt_logprobs is not None:
            assert self.outputs[emission.seq_id] == []
            scored = [entry and entry.token for entry in emission.prompt_logprobs]
            self.scored[emission.seq_id] = scored
        self.outputs[emission.seq_id] += emission.tokens
        if emission.finish:
            self.finished[emission.seq_id] = emission.finish


def check(engine: Engine) -> None:
    scheduler = engine._scheduler
    pool, sequences, queues = scheduler.pool, scheduler.sequences.values(), scheduler._queues
    pool.check([table for seq in sequences for table in seq.tables])
    if not queues._is_contended:  # else it changes with what is computed
        assert list(scheduler.running) == [
            seq.id for seq in sorted(queues.running.values(), key=queues.rank)
        ]
    assert queues._num_holding == sum(1 for seq in queues.running.values() if seq.tables)
    assert max((seq.in_flight for seq in sequences), default=0) <= scheduler.num_in_flight
    for seq in sequences:
        num_tokens = seq.num_prompt + seq.max_tokens
        longest = max(map(len, seq.tables), default=0)
        assert seq.num_published <= longest <= pool.blocks_for(num_tokens)
        if not seq.in_flight:
            held = [block for table in seq.tables for block in table if block != NULL]
            assert len(held) <= scheduler.grouped.most_blocks(num_tokens)
        if seq in scheduler.waiting:
            assert seq.id not in scheduler.running
            assert not seq.in_flight
        elif seq.id not in scheduler.running:
            assert seq.in_flight, "it is over"
        elif seq.tables:
            num_drawing = seq.num_computed + seq.num_pending - len(seq.tokens)
            assert 0 <= num_drawing <= seq.in_flight
            assert seq.num_pending > 0
        else:
            assert seq.num_pending == 0
    for key, owner in scheduler._queues.prefixes.computing.items():
        seq = scheduler.sequences[owner]
        assert key in seq.keys[seq.num_published :]


def verify(run: Run) -> None:
    """Every sequence emitted what it must, or a beginning of it if it was aborted."""
    for number, arrival in enumerate(run.arrivals):
        seeds = completion_seeds(arrival.job)
        for seq_id in run.ids[number]:
            want, finish = expected(arrival.job, next(seeds))
            got = run.outputs[seq_id]
            if arrival.job.sampling.prompt_logprobs is None:
                assert seq_id not in run.scored
            elif got or run.finished.get(seq_id) in ("stop", "length"):
                assert run.scored[seq_id] == [None, *arrival.job.prompt[1:]]
            if run.finished.get(seq_id) == "error":
                assert run.runner.failing
                assert got == want[: len(got)]
            elif seq_id in run.finished:
                assert (got, run.finished[seq_id]) == (want, finish)
            else:
                assert arrival.aborted_at is not None
                assert got == want[: len(got)]
    scheduler = run.engine._scheduler
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert not scheduler.sequences
    assert scheduler.shares is None or not scheduler.shares._served
    assert not scheduler._queues.prefixes.computing


def replay_recording(run: Run) -> None:
    """Written to a file and read back, the schedule comes out the same without a model."""
    if run.recording is None:  # all was over before
        return
    lines = list(run.recording.lines())
    steps = list(recorded_again(read(lines)))
    assert [step.difference for step in steps] == [""] * len(steps)
    num_steps = sum(step.event.kind != "wait" for step in steps)
    assert num_steps == sum(b'"step":' in line for line in lines[2:])


def replay(run: Run) -> None:
    """Plans are values: sent to a rank as bytes, they make another runner do the same."""
    depth, grammar_depth = run.runner.depth, run.runner.grammar_depth
    runner = FakeRunner(
        run.runner.block_size, ALPHABET, depth=depth, matchers=make_matchers(grammar_depth),
        windows=run.runner.windows,
    )  # fmt: skip
    for plan, result in zip(run.runner.plans, run.results, strict=True):
        sent = decode_plan(encode_plan(plan))
        assert sent == plan
        assert decode_result(encode_result(runner.launch(sent).result())) == result
    runner.close()


@st.composite
def arrivals(draw: st.DrawFn, most: int = 8) -> list[Arrival]:
    """Jobs that share prefixes often: prompts are cut from two long texts."""
    texts = [[97 + (i * i + t) % 11 for i in range(50)] for t in range(2)]
    items = []
    for _ in range(draw(st.integers(1, most))):
        text, length = draw(st.sampled_from(texts)), draw(st.integers(1, 45))
        tail = draw(st.lists(st.integers(97, 99), max_size=4))
        prompt = tuple(text[:length] + tail)
        sampling = SamplingParams(
            max_tokens=draw(st.none() | st.integers(0, MAX_MODEL_LEN - len(prompt))),
            temperature=draw(st.sampled_from([0.0, 1.0])),
            stop_token_ids=draw(st.sampled_from([(), (), (100,)])),
            seed=draw(st.integers(0, 2**40)),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
            ignore_eos=draw(st.booleans()),
            grammar=draw(st.sampled_from([None, None, None, *RULES])),
            logprobs=draw(st.sampled_from([None, None, 0])),
        )
        job = Job(
            prompt,
            sampling,
            n=draw(st.sampled_from([1, 1, 2, 5])),
            priority=draw(st.integers(0, 2)),
            tenant=draw(st.sampled_from(["", "a", "b"])),
            weight=draw(st.sampled_from([1.0, 3.0])),
            cache_salt=draw(st.sampled_from(["", "", "salt"])),
        )
        at = draw(st.integers(0, 12))
        aborted = draw(st.none() | st.integers(2 * at, 2 * at + 40).map(lambda half: half / 2))
        items.append(Arrival(job, at, aborted))
    return items


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    budget = draw(st.sampled_from([1, 3, 8, 20, 512]))
    config = EngineConfig(
        block_size=block_size,
        max_num_seqs=draw(st.integers(1, min(budget, 8))),
        max_num_batched_tokens=budget,
        batching=draw(st.sampled_from(["sequential", "static", "continuous"])),
        scheduling_policy=draw(st.sampled_from(["fair", "fcfs", "priority"])),
        enable_prefix_caching=draw(st.booleans()),
        enable_chunked_prefill=draw(st.booleans()),
    )
    windows = draw(st.sampled_from([(0,), (0,), (0, 5), (7,), (0, 17, 17), (0, 0, 3, 26)]))
    fewest = most_blocks(MAX_MODEL_LEN, block_size, windows, longest_chunk(config))
    more = draw(st.sampled_from([0, 1, fewest // 2, 4 * fewest, 40 * fewest]))
    stages = draw(st.sampled_from([1, 1, 2, 3]))
    depth = stages + 1 if stages > 1 else draw(st.sampled_from([1, 2, 2]))
    return {
        "config": replace(config, pipeline_parallel_size=stages),
        "num_blocks": fewest + more,
        "windows": windows,
        "depth": depth,
        "grammar_depth": draw(st.integers(1, depth)),
        "eager": draw(st.booleans()),
        "record_from": draw(st.sampled_from([0, 0, 1, 5, 9])),
    }


@settings(max_examples=60, deadline=None)
@given(arrivals(), worlds())
def test_same_tokens_whatever_the_schedule(load, world):
    run = Run(load, **world).go()
    verify(run)
    replay(run)
    replay_recording(run)


@settings(max_examples=40, deadline=None)
@given(arrivals(), worlds(), st.integers(2, 4))
def test_same_tokens_however_many_a_step_brings(load, world, at_once):
    """As with accepted drafts, which only one step at a time can have."""
    verify(Run(load, **world | {"depth": 1, "grammar_depth": 1}, at_once=at_once).go())


@settings(max_examples=60, deadline=None)
@given(
    arrivals(),
    worlds(),
    st.dictionaries(st.integers(1, 30), st.sampled_from(["launch", "run"]), max_size=4),
)
def test_a_failed_step_ends_its_sequences_and_touches_nothing_else(load, world, failing):
    """`verify` holds all others, and whoever finds a block in the cache, to their right tokens."""
    run = Run(load, **world, failing=failing).go()
    verify(run)
    replay_recording(run)
    of_failed = {
        chunk.seq_id for plan in run.runner.plans if plan.step in failing for chunk in plan.chunks
    }
    assert {id for id, reason in run.finished.items() if reason == "error"} <= of_failed
    ended = of_failed & run.finished.keys()
    aborted = of_failed - ended
    assert aborted <= {
        id for n, a in enumerate(load) if a.aborted_at is not None for id in run.ids[n]
    }


def mixed_load(
    rng: random.Random, num_jobs: int, num_steps: int, constrained: bool = False
) -> list[Arrival]:
    system = [rng.randrange(97, 108) for _ in range(24)]
    load = []
    for _ in range(num_jobs):
        own = [rng.randrange(97, 108) for _ in range(rng.randrange(1, 16))]
        prompt = tuple(rng.choice([[], system[:12], system]) + own)
        sampling = SamplingParams(
            max_tokens=rng.choice([None, rng.randrange(0, 20)]),
            temperature=float(rng.random() < 0.5),
            seed=rng.randrange(2**50),
            ignore_eos=rng.random() < 0.7,
            prompt_logprobs=rng.choice([None, None, None, 0]),
            grammar=rng.choice([None, *RULES]) if constrained else None,
        )
        job = Job(
            prompt,
            sampling,
            n=rng.choice([1, 1, 1, 3]),
            priority=rng.randrange(3),
            tenant=rng.choice("abc"),
        )
        at = rng.randrange(num_steps)
        aborted = at + rng.randrange(60) / 2 if rng.random() < 0.3 else None
        load.append(Arrival(job, at, aborted))
    return load


@pytest.mark.parametrize(
    ("policy", "constrained", "windows", "depth", "grammar_depth"),
    [
        ("fcfs", False, (0,), 1, 1),
        ("fair", False, (0,), 2, 1),
        ("priority", False, (0,), 2, 2),
        ("fcfs", True, (0,), 2, 2),
        ("fcfs", True, (9,), 1, 1),
        ("priority", False, (0, 9), 1, 1),
        ("fair", True, (0, 9), 2, 2),
    ],
)
def test_a_long_run_under_pressure(policy, constrained, depth, grammar_depth, windows):
    """Many jobs through a cache that holds two or three: preemption all the time."""
    load = mixed_load(random.Random(7), num_jobs=150, num_steps=55, constrained=constrained)
    config = EngineConfig(
        block_size=4,
        max_num_seqs=16,
        max_num_batched_tokens=24,
        scheduling_policy=policy,
        max_num_queued_reqs=10_000,
    )
    num_blocks = most_blocks(MAX_MODEL_LEN, 4, windows, 24) + 2
    run = Run(load, num_blocks, config, depth, grammar_depth, windows=windows).go()
    verify(run)
    counters = run.engine._scheduler.counters
    assert counters.preempted > (20 if 0 in windows else 0)
    assert counters.cached > 500


def test_policies_differ_in_steps_only():
    load = mixed_load(random.Random(1), num_jobs=40, num_steps=1)
    load = [replace(arrival, aborted_at=None) for arrival in load]
    steps = {}
    for batching in ("sequential", "static", "continuous"):
        config = EngineConfig(block_size=4, max_num_seqs=8, batching=batching)
        run = Run(load, 400, config).go()
        verify(run)
        steps[batching] = run.step
    assert steps["continuous"] < steps["static"] < steps["sequential"]
