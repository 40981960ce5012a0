"""Plans are values: written down, read back and run again, they give the same tokens, whatever a
runner keeps of sequences in between."""

import pickle
from collections import deque
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import numpy as np
import pytest
import torch

from ruvon.config import EngineConfig
from ruvon.engine.engine import Engine
from ruvon.engine.grammar import Grammars
from ruvon.engine.matching import Matchers
from ruvon.engine.runner import Runner
from ruvon.engine.sampler import sample
from ruvon.engine.types import Job, SamplingParams
from ruvon.grammars import regex

PAGE, BLOCKS, VOCAB, LONGEST = 4, 16, 40, 40
WINDOWS = ((0,), (0, 6), (6,))  # of the cache groups


class Letters:
    """One character a token: 0 ends, then ``A`` and up."""

    vocab_size, bos_id, special_ids = VOCAB, None, frozenset({0})

    def token_bytes(self, id):
        return bytes([64 + id]) if id else b"<end>"

    def encode(self, text, *, add_special_tokens):
        return [ord(char) - 64 for char in text]


@pytest.fixture(scope="module")
def letters():
    made = Grammars(Letters(), VOCAB, (0,))
    yield made
    made.close()


SAMPLINGS = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=1),
    SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=1.0),
    SamplingParams(temperature=1, presence_penalty=2.0, logprobs=2),
    SamplingParams(temperature=0, bad_words=tuple((a, b) for a in range(40) for b in range(20))),
    SamplingParams(temperature=0, min_tokens=9, logit_bias=MappingProxyType({3: 4.0, 7: 4.0})),
    SamplingParams(temperature=0, prompt_logprobs=1),
    SamplingParams(temperature=1, grammar=regex("([A-E]FGH)*"), frequency_penalty=1.0),
    SamplingParams(temperature=0, grammar=regex("[^A]{9}(BCD)?"), logprobs=1, min_tokens=9),
)
JOBS = [
    Job(
        tuple((5 * i + place) % VOCAB for place in range(3 + 4 * i % 13)),
        replace(sampling, max_tokens=18, seed=i),
        n=1 + i % 2,
    )
    for i, sampling in enumerate(SAMPLINGS * 2)
]


class Context:
    """A model whose logits depend on all tokens of a sequence that any of its layers sees, read
    from a cache by their tables."""

    def __init__(self, windows):
        self._windows = windows
        self._cache = np.zeros((BLOCKS + 1) * PAGE, dtype=np.int64)

    def __call__(self, batch):
        for index in batch.paged:
            self._cache[index.slots] = batch.token_ids
        logits = torch.empty(len(batch.logit_rows), VOCAB)
        for i, row in enumerate(batch.logit_rows.tolist()):
            owner = int(np.searchsorted(batch.query_starts, row, side="right")) - 1
            end, tokens = int(batch.positions[row]) + 1, []
            for window, index in zip(self._windows, batch.paged, strict=True):
                places = np.arange(max(end - window, 0) if window else 0, end)
                slots = index.block_tables[owner][places // PAGE] * PAGE + places % PAGE
                tokens.append(self._cache[slots].tolist())
            seed = hash(tuple(map(tuple, tokens))) % 2**31
            logits[i] = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
        return logits


@pytest.fixture
def make_runner(letters):
    made = []

    def make(windows):
        runner = Runner(
            Context(windows), partial(sample, eos_token_ids=(0,)), windows=windows,
            block_size=PAGE, device=None, max_logit_rows=100, matchers=Matchers(letters),
        )  # fmt: skip
        made.append(runner)
        return runner

    yield make
    for runner in made:
        runner.close()


def drive(runner, jobs, depth, grammars, windows):
    """Tokens by completion, and all plans as they were written down, each with its result."""
    config = EngineConfig(block_size=PAGE, max_num_seqs=5, max_num_batched_tokens=12)
    engine = Engine(
        runner, config,
        max_model_len=LONGEST, num_blocks=BLOCKS, windows=windows, vocab_size=VOCAB,
        eos_token_ids=(0,), grammars=grammars,
    )  # fmt: skip
    runner.depth = depth
    tokens, written, pending, first = {}, [], deque(), 0
    for job in jobs:
        tokens |= {first + k: [] for k in range(job.n)}
        engine.add(engine.prepare(job), 0.0, first)
        first += job.n
    while engine.has_work:
        while (step := engine.launch(0.0)) is not None:
            written.append(pickle.dumps(step.plan))
            pending.append(step)
        step = pending.popleft()
        written[step.plan.step - 1] = (written[step.plan.step - 1], step.future.result())
        for emission in engine.collect(step):
            assert emission.error is None
            tokens[emission.index] += emission.tokens
    return tokens, written, engine._scheduler.counters.preempted


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("depth", [1, 2])
def test_plans_that_were_written_down_give_the_same_again(make_runner, letters, depth, windows):
    tokens, written, preempted = drive(make_runner(windows), JOBS, depth, letters, windows)
    assert preempted or all(windows)
    again = make_runner(windows)
    for plan, result in written:
        new = again.launch(pickle.loads(plan)).result()
        assert new.tokens == result.tokens
        assert new.logprobs == result.logprobs
        assert new.prompt_logprobs == result.prompt_logprobs
    alone, number = {}, 0
    for job in JOBS:
        for _, own in sorted(drive(make_runner(windows), [job], 1, letters, windows)[0].items()):
            alone[number] = own
            number += 1
    assert tokens == alone
