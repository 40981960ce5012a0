"""The runner with a model that a test can compute in its head."""

import threading
from functools import partial

import pytest
import torch

from ruvon.engine.batch import build_batch
from ruvon.engine.runner import Runner
from ruvon.engine.sampler import sample
from ruvon.engine.types import UNDRAWN, Chunk, Plan, PromptRow, SamplingParams, SamplingRow

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


def greedy(seq_id, history, **sampling):
    return SamplingRow(seq_id, SamplingParams(temperature=0, **sampling), history, 1, 0)


def mixed_plan() -> Plan:
    chunks = (
        Chunk(1, (10,), 5, [3, 1], True),
        Chunk(2, (20, 21, 22, 23, 24), 0, [5, 6], False),
        Chunk(3, (30, 31, 32), 0, [7], True),
    )
    prompt_rows = (
        PromptRow(2, 1, (21, 22, 23, 24, 40), 1),
        PromptRow(3, 2, (31, 32), 0),
    )
    return Plan(0, chunks, (greedy(1, [10]), greedy(3, [30, 31, 32])), prompt_rows)


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
    plan = Plan(0, (Chunk(1, (4, 5), 0, [0], False),), ())
    result = make_runner().launch(plan).result(timeout=10)
    assert result.tokens == ()


def test_failures_are_the_futures(make_runner, forward):
    plan = Plan(0, (Chunk(1, (4, 5), 0, [], True),), (greedy(1, [4, 5]),))
    runner = make_runner()
    assert isinstance(runner.launch(plan).exception(timeout=10), (IndexError, ValueError))
    assert runner.launch(mixed_plan()).result(timeout=10).tokens == ((11,), (33,))


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
    plans = [Plan(n, (Chunk(n, (n,), 0, [n], True),), (greedy(n, [n]),)) for n in range(20)]
    futures = [runner.launch(plan) for plan in plans]
    assert [future.result(timeout=10).tokens for future in futures] == [
        ((n + 1,),) for n in range(20)
    ]
    assert [int(batch.token_ids[0]) for batch in forward.batches] == list(range(20))


def decode(*tokens):
    """A step of one token for each sequence, at position 1."""
    return tuple(Chunk(seq_id, (token,), 1, [seq_id], True) for seq_id, token in enumerate(tokens))


def test_a_step_ahead_computes_what_the_step_before_drew(make_runner, forward):
    runner = make_runner()
    rows = tuple(greedy(n, [n]) for n in (0, 1))
    first = tuple(Chunk(n, (n,), 0, [n], True) for n in (0, 1))
    futures = [
        runner.launch(Plan(1, first, rows)),
        runner.launch(Plan(2, decode(UNDRAWN, UNDRAWN)[::-1], rows[::-1])),
        runner.launch(Plan(3, decode(7, 8), rows)),
    ]
    assert [future.result(timeout=10).tokens for future in futures] == [
        ((1,), (2,)),
        ((3,), (2,)),
        ((8,), (9,)),
    ]
    assert [batch.token_ids.tolist() for batch in forward.batches] == [[0, 1], [2, 1], [7, 8]]


@pytest.mark.parametrize("committed", [True, False])
def test_the_sampler_gets_the_history_up_to_its_step(forward, committed):
    """Whatever the scheduler has appended meanwhile."""
    seen = []

    def sampler(logits, rows):
        seen.append([list(row.history) for row in rows])
        return sample(logits, rows, ())

    runner = Runner(forward, sampler, block_size=4, device=CPU, max_logit_rows=100)
    history = [4, 5]
    row = greedy(0, history, presence_penalty=1)
    runner.launch(Plan(1, (Chunk(0, (4, 5), 0, [0], True),), (row,))).result(timeout=10)
    if committed:
        history += [6, 7]
    ahead = Plan(2, (Chunk(0, (UNDRAWN,), 2, [0], True),), (row,))
    assert runner.launch(ahead).result(timeout=10).tokens == ((7,),)
    runner.close()
    assert seen == [[[4, 5]], [[4, 5, 6]]]


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
    rows = (greedy(0, [0], presence_penalty=1), greedy(1, [1]))
    first = runner.launch(Plan(1, tuple(Chunk(n, (n,), 0, [n], True) for n in (0, 1)), rows))
    second = runner.launch(Plan(2, decode(UNDRAWN, UNDRAWN), rows))
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
    assert forward.batches[0].slots.tolist() == build_batch(mixed_plan(), 4, CPU).slots.tolist()
