"""The runner with a model that a test can compute in its head."""

import threading
from functools import partial

import pytest
import torch

from ruvon.engine.batch import build_batch
from ruvon.engine.runner import Runner
from ruvon.engine.sampler import sample
from ruvon.engine.types import (
    BEING_SAMPLED,
    Chunk,
    NewSequence,
    Plan,
    PromptRow,
    SamplingParams,
)

VOCAB = 50
CPU = torch.device("cpu")


class NextToken:
    """Finds the token after each of its input tokens the likeliest. Remembers its batches."""

    def __init__(self) -> None:
        self.batches = []
        self.thread = None

    def __call__(self, batch):
        self.batches.append(batch)
        self.thread = threading.current_thread()
        assert torch.is_inference_mode_enabled()
        following = (batch.token_ids[batch.logit_rows] + 1) % VOCAB
        return torch.nn.functional.one_hot(following.long(), VOCAB).float() * 5


@pytest.fixture
def forward():
    return NextToken()


@pytest.fixture
def make_runner(forward):
    made = []

    def make(max_logit_rows=100):
        runner = Runner(
            forward,
            partial(sample, eos_token_ids=(0,)),
            block_size=4,
            device=CPU,
            max_logit_rows=max_logit_rows,
        )
        made.append(runner)
        return runner

    yield make
    for runner in made:
        runner.close()


def greedy(seq_id, num_prompt=1, prefix=(), **sampling):
    return NewSequence(seq_id, SamplingParams(temperature=0, **sampling), num_prompt, 0, prefix)


def mixed_plan() -> Plan:
    chunks = (
        Chunk(1, 0, (10,), 5, ((3, 1),), True),
        Chunk(2, 0, (20, 21, 22, 23, 24), 0, ((5, 6),), False),
        Chunk(3, 0, (30, 31, 32), 0, ((7,),), True),
    )
    prompt_rows = (
        PromptRow(2, 1, (21, 22, 23, 24, 40), 1),
        PromptRow(3, 2, (31, 32), 0),
    )
    new = tuple(greedy(seq_id) for seq_id in (1, 2, 3))
    return Plan(0, chunks, new, prompt_rows=prompt_rows)


def test_a_step_samples_its_rows_and_scores_its_prompts(make_runner, forward):
    result = make_runner().launch(mixed_plan()).result(timeout=10)
    assert result.tokens == ((11,), (33,))
    assert result.logprobs == (None, None)
    assert [entry.token for entry in result.prompt_logprobs[2]] == [21, 22, 23, 24, 40]
    assert [entry.rank for entry in result.prompt_logprobs[2]] == [1, 1, 1, 1, 2]
    assert [entry.top[0][0] for entry in result.prompt_logprobs[2]] == [21, 22, 23, 24, 25]
    assert [entry.token for entry in result.prompt_logprobs[3]] == [31, 32]
    assert result.errors == {}
    assert result.seconds > 0
    assert forward.thread is not threading.current_thread()


@pytest.mark.parametrize("max_logit_rows", [2, 3, 8])
def test_bounded_logits_give_the_same(make_runner, forward, max_logit_rows):
    whole = make_runner().launch(mixed_plan()).result(timeout=10)
    bounded = make_runner(max_logit_rows).launch(mixed_plan()).result(timeout=10)
    assert bounded.tokens == whole.tokens
    assert bounded.prompt_logprobs == whole.prompt_logprobs
    pieces = [len(batch.logit_rows) for batch in forward.batches[1:]]
    assert max(pieces) <= max_logit_rows
    assert sum(pieces) == 9


def test_a_step_may_sample_nothing(make_runner):
    plan = Plan(0, (Chunk(1, 0, (4, 5), 0, ((0,),), False),), (greedy(1),))
    result = make_runner().launch(plan).result(timeout=10)
    assert result.tokens == ()


def test_failures_are_the_futures(make_runner, forward):
    runner = make_runner()
    without_blocks = Plan(0, (Chunk(1, 0, (4, 5), 0, (), True),), (greedy(1),))
    assert isinstance(runner.launch(without_blocks).exception(timeout=10), (IndexError, ValueError))
    unheard_of = Plan(0, (Chunk(9, 0, (4, 5), 0, (), True),))
    assert isinstance(runner.launch(unheard_of).exception(timeout=10), KeyError)
    assert runner.launch(mixed_plan()).result(timeout=10).tokens == ((11,), (33,))


def test_a_step_that_cannot_be_laid_out_fails_nobody_elses(make_runner):
    """The next one was planned on top of it: it goes on with the sequences that it introduced."""
    runner = make_runner()
    failing = Plan(0, (Chunk(1, 0, (4, 5), 0, (), True),), (greedy(1),))
    both = Plan(
        1,
        (Chunk(1, 0, BEING_SAMPLED, 2, ((1,),), True), Chunk(2, 0, (7, 8), 0, ((2,),), True)),
        (greedy(2),),
    )
    failed, result = runner.launch(failing), runner.launch(both)
    assert failed.exception(timeout=10) is not None
    assert result.result(timeout=10).tokens[1] == (9,)


def test_a_thread_that_cannot_start_is_told_to_whoever_waits(forward):
    def broken():
        raise PermissionError("no such core")

    runner = Runner(
        forward, partial(sample, eos_token_ids=()), block_size=4, device=CPU, max_logit_rows=100,
        at_start=broken,
    )  # fmt: skip
    assert isinstance(runner.launch(mixed_plan()).exception(timeout=10), PermissionError)
    assert not runner.lost
    runner.close()
    assert runner.lost


def test_one_bad_row_fails_alone(make_runner):
    plan = mixed_plan()

    def forward(batch):
        logits = NextToken()(batch)
        logits[-1] = float("nan")  # the last prompt position of sequence 3
        return logits

    runner = Runner(
        forward, partial(sample, eos_token_ids=()), block_size=4, device=CPU, max_logit_rows=100
    )
    result = runner.launch(plan).result(timeout=10)
    runner.close()
    assert result.tokens == ((11,), (33,))
    assert list(result.errors) == [3]


def test_steps_run_in_the_order_of_launching(make_runner, forward):
    runner = make_runner()
    plans = [Plan(n, (Chunk(n, 0, (n,), 0, ((n,),), True),), (greedy(n),)) for n in range(20)]
    futures = [runner.launch(plan) for plan in plans]
    assert [future.result(timeout=10).tokens for future in futures] == [
        ((n + 1,),) for n in range(20)
    ]
    assert [int(batch.token_ids[0]) for batch in forward.batches] == list(range(20))


def decode(*tokens):
    """A step of one token for each sequence, at position 1, its block known."""
    return tuple(Chunk(seq_id, 0, token, 1, (), True) for seq_id, token in enumerate(tokens))


def prompts(*tokens):
    """A step of one token for each sequence, at position 0."""
    return tuple(Chunk(n, 0, (token,), 0, ((n,),), True) for n, token in enumerate(tokens))


def test_a_step_ahead_computes_what_the_step_before_sampled(make_runner, forward):
    runner = make_runner()
    futures = [
        runner.launch(Plan(1, prompts(0, 1), (greedy(0), greedy(1)))),
        runner.launch(Plan(2, decode(BEING_SAMPLED, BEING_SAMPLED)[::-1])),
        runner.launch(Plan(3, decode((7,), (8,)))),
    ]
    assert [future.result(timeout=10).tokens for future in futures] == [
        ((1,), (2,)),
        ((3,), (2,)),
        ((8,), (9,)),
    ]
    assert [batch.token_ids.tolist() for batch in forward.batches] == [[0, 1], [2, 1], [7, 8]]


def test_the_sampler_gets_the_history_up_to_its_step(forward):
    """Whatever of it was found in the cache, came in chunks, was sampled, or came after that."""
    seen = []

    def sampler(logits, rows):
        seen.append([list(row.history) for row in rows])
        return sample(logits, rows, ())

    runner = Runner(forward, sampler, block_size=4, device=CPU, max_logit_rows=100)
    new = greedy(0, 4, prefix=(1, 2), presence_penalty=1)
    chunks = [
        Chunk(0, 0, (3,), 2, ((0,),), False),
        Chunk(0, 0, (4,), 3, (), True),
        Chunk(0, 0, BEING_SAMPLED, 4, ((1,),), True),
        Chunk(0, 0, (9,), 5, (), True),
    ]
    for n, chunk in enumerate(chunks):
        plan = Plan(n, (chunk,), () if n else (new,))
        runner.launch(plan).result(timeout=10)
    again = Plan(9, (Chunk(0, 1, (7,), 0, ((2,),), True),), (greedy(0),), ended=(0,))
    runner.launch(again).result(timeout=10)
    runner.close()
    assert seen == [[], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, 9]], [[7]]]


def test_a_failed_row_fails_nothing_after_it(forward):
    def broken_at_first(batch):
        logits = forward(batch)
        if len(forward.batches) == 1:
            logits[0] = float("nan")
        return logits

    runner = Runner(
        broken_at_first, partial(sample, eos_token_ids=()),
        block_size=4, device=CPU, max_logit_rows=100,
    )  # fmt: skip
    new = (greedy(0, presence_penalty=1), greedy(1))
    first = runner.launch(Plan(1, prompts(0, 1), new))
    second = runner.launch(Plan(2, decode(BEING_SAMPLED, BEING_SAMPLED)))
    assert list(first.result(timeout=10).errors) == [0]
    assert second.result(timeout=10).tokens[1] == (3,)
    runner.close()


def test_closing_does_not_wait_for_a_step_that_is_stuck(monkeypatch):
    monkeypatch.setattr("ruvon.engine.runner.PATIENCE", 0.01)
    let_go = threading.Event()
    runner = Runner(
        lambda batch: let_go.wait(), partial(sample, eos_token_ids=()),
        block_size=4, device=CPU, max_logit_rows=100,
    )  # fmt: skip
    future = runner.launch(mixed_plan())
    runner.close()
    assert not future.done()
    let_go.set()
    assert future.exception(timeout=10)


def test_a_closed_runner_fails_what_is_launched():
    runner = Runner(
        lambda batch: pytest.fail("computed"), partial(sample, eos_token_ids=()),
        block_size=4, device=CPU, max_logit_rows=100,
    )  # fmt: skip
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.launch(mixed_plan()).result(timeout=10)


def test_the_thread_that_runs_steps_makes_itself_at_home_first():
    calls = []
    runner = Runner(
        lambda batch: calls.append(threading.get_ident()) or torch.zeros(2, 8),
        partial(sample, eos_token_ids=()),
        block_size=4, device=CPU, max_logit_rows=100,
        at_start=lambda: calls.append(threading.get_ident()),
    )  # fmt: skip
    runner.launch(mixed_plan()).result(timeout=10)
    runner.close()
    assert len(calls) == 2
    assert calls[0] == calls[1] != threading.get_ident()


def test_the_batch_is_the_plans(make_runner, forward):
    make_runner().launch(mixed_plan()).result(timeout=10)
    expected = build_batch(mixed_plan(), 4, CPU)
    assert forward.batches[0].paged[0].slots.tolist() == expected.paged[0].slots.tolist()
