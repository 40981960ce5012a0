"""The same request gives the same bytes: on the real default model, and that we would notice."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from embedded import needs_model
from fakes import ByteTokenizer, FakeRunner

from ruvon.cli import main
from ruvon.config import EngineConfig
from ruvon.engine.startup import LoadedEngine, start_engine
from ruvon.engine.types import Plan, StepResult, TokenLogprobs
from ruvon.telemetry import silent
from ruvon.verify import cases, report
from ruvon.verify.answers import Answer, Difference, find_difference
from ruvon.verify.cases import ALONE, CASES, Row, judge
from ruvon.verify.report import (
    check_cases,
    check_restarts,
    compare_with_torch,
    engine_settings,
    other_teams,
)
from ruvon.verify.requests import FEWEST, Requests, make_jobs

TOKENS = 4


def settings() -> EngineConfig:
    return engine_settings(EngineConfig(threads=2, device="cpu"), FEWEST, silent)


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedEngine]:
    loaded = start_engine(settings(), silent)
    if not loaded.batch_invariant:
        pytest.skip("no kernels for this processor")
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def jobs(loaded: LoadedEngine) -> Requests:
    return make_jobs(loaded.tokenizer, FEWEST, TOKENS, 200, loaded.memory.block_size)


@pytest.fixture(scope="module")
def rows(loaded: LoadedEngine, jobs: Requests) -> dict[str, Row]:
    return {row.name: row for row in check_cases(loaded, jobs, silent)}


@needs_model
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_default_model_gives_the_same_bytes(rows: dict[str, Row], case: Any) -> None:
    row = rows[case.name]
    assert row.difference is None
    assert row.missing is None, "the case did not happen"
    assert row.outcome.num_tokens


@needs_model
@pytest.mark.slow
def test_other_numbers_of_threads_and_another_start(
    loaded: LoadedEngine, jobs: Requests, rows: dict[str, Row]
) -> None:
    before = SimpleNamespace(threads=2, device="cpu", rows=[rows["alone"]])
    again = check_restarts(settings(), before, jobs, silent)
    assert [row.name for row in again] == ["threads: 1", "loaded again, alone"]
    assert [row.difference for row in again] == [None, None]
    assert len({row.outcome.fingerprint for row in (rows["alone"], *again)}) == 1


# ------------------------------------------------------------------ that we would notice


class Meddler:
    """A runner whose results depend on the batch: with three chunks or more in a step, it changes
    one row's token, or the last bit of one row's log-probability."""

    def __init__(self, runner: Any, what: str) -> None:
        self.depth = 1
        self._runner, self._what = runner, what

    def launch(self, plan: Plan) -> Future[StepResult]:
        future = self._runner.launch(plan)
        if len(plan.chunks) < 3:
            return future
        meddled: Future[StepResult] = Future()
        meddled.set_result(self.change(future.result()))
        return meddled

    def change(self, result: StepResult) -> StepResult:
        if self._what == "token":
            return replace(result, tokens=tuple((tokens[0] ^ 1,) for tokens in result.tokens))
        return replace(
            result,
            logprobs=tuple(
                given
                and tuple(replace(one, logprob=math.nextafter(one.logprob, 0)) for one in given)
                for given in result.logprobs
            ),
        )


def with_runner(loaded: LoadedEngine, what: str) -> LoadedEngine:
    return replace(loaded, runner=Meddler(loaded.runner, what))


@needs_model
@pytest.mark.slow
@pytest.mark.parametrize("what", ["token", "logprob"])
def test_a_planted_difference_is_found(
    loaded: LoadedEngine, jobs: Requests, rows: dict[str, Row], what: str
) -> None:
    together, alone = CASES[1], rows["alone"].outcome
    found = cases.run(together, with_runner(loaded, what), jobs)
    difference = judge(together, alone, found).difference
    assert difference is not None
    answer = alone.answers[difference.request]
    token = answer.tokens[difference.position]
    said = difference.describe(loaded.tokenizer)
    assert f"request {difference.request}, output position {difference.position}: " in said
    assert f"token {token} " in said
    assert (f"token {token ^ 1} " in said) == (what == "token")
    if what == "logprob":
        logprob = answer.logprobs[difference.position].logprob
        assert f"{logprob!r} alone, {math.nextafter(logprob, 0)!r} here" in said


# ------------------------------------------------------------------ without a model


def fake_loaded(make_engine: Any, runner: Any = None, promised: bool = True) -> Any:
    """What `check_cases` needs of a `Started`."""
    engine = make_engine(
        FakeRunner(16), num_blocks=400, max_model_len=600, max_num_seqs=FEWEST,
        enable_prefix_caching=False,
    )  # fmt: skip
    return SimpleNamespace(
        engine=engine,
        runner=runner or Fresh(),
        memory=SimpleNamespace(max_model_len=600, num_blocks=400, block_size=16, windows=(0,)),
        eos_token_ids=(),
        tokenizer=ByteTokenizer(),
        checkpoint=SimpleNamespace(name="fake"),
        device="cuda",
        kernels="fake",
        dtype="float32",
        threads=1,
        batch_invariant=promised,
        close=lambda: None,
    )


class Fresh:
    """A runner for one engine after another: a `FakeRunner` remembers what it has seen."""

    depth = 1

    def launch(self, plan: Plan) -> Future[StepResult]:
        if plan.step == 1:
            self._runner = FakeRunner(16)
        return self._runner.launch(plan)


@pytest.fixture
def run_verify(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(runner: Any, promised: bool) -> Any:
        monkeypatch.setattr(
            report, "start_engine",
            lambda config, progress: fake_loaded(make_engine, runner, promised),
        )  # fmt: skip
        monkeypatch.setattr(report, "engine_settings", lambda config, number, progress: config)
        return CliRunner().invoke(main, ["verify", "--requests", "8", "--no-reference"])

    return run


@pytest.mark.parametrize("promised", [True, False])
def test_the_command_says_yes(run_verify: Any, promised: bool) -> None:
    result = run_verify(None, promised)
    assert result.exit_code == 0, result.output
    assert result.output.count(" yes ") == len(CASES) + 2
    assert ("promise nothing" in result.output) == (not promised)


def test_the_command_fails_for_a_broken_promise(run_verify: Any) -> None:
    result = run_verify(Meddler(Fresh(), "token"), promised=True)
    assert result.exit_code == 1
    assert "Error: all at once: request 0, output position 0: token " in result.output


def test_the_command_reports_what_nobody_promised(run_verify: Any) -> None:
    result = run_verify(Meddler(Fresh(), "token"), promised=False)
    assert result.exit_code == 0
    assert " no " in result.output
    assert "The first difference: all at once: request 0, output position 0: " in result.output


def test_a_case_that_did_not_happen_is_no_proof(make_engine: Any) -> None:
    loaded = fake_loaded(make_engine)
    jobs = make_jobs(ByteTokenizer(), FEWEST, TOKENS, 500, 16)
    alone = cases.run(ALONE, loaded, jobs)
    for case in CASES:
        if case.needs:
            calm = cases.run(CASES[1], fake_loaded(make_engine), jobs)
            row = judge(case, alone, calm)
            assert row.missing == f"nothing was {case.needs}"
            assert not row.equal


def test_an_answer_cut_short_is_a_difference() -> None:
    def answers(*tokens: int) -> dict[int, Answer]:
        return {5: Answer(tokens=list(tokens))}

    found = find_difference(answers(65, 66), answers(65))
    assert found == Difference(5, "output", 1, 66, None)
    assert found.describe(ByteTokenizer()).endswith("token 66 'B' alone, nothing here")


def test_alternatives_are_compared_too() -> None:
    one = Answer([65], [TokenLogprobs(65, -1.0, 1, ((65, -1.0), (66, -2.0)))])
    other = Answer([65], [TokenLogprobs(65, -1.0, 1, ((65, -1.0), (67, -2.0)))])
    found = find_difference({0: one}, {0: other})
    assert found is not None
    assert "alternatives ((65, -1.0), (66, -2.0)) alone" in found.describe(ByteTokenizer())


@pytest.mark.parametrize(("threads", "others"), [(1, [2]), (2, [1]), (3, [1, 2]), (8, [1, 7])])
def test_other_teams(threads: int, others: list[int]) -> None:
    assert other_teams(threads) == others


def test_plain_torch_need_not_keep_the_promise(tmp_path: Path) -> None:
    """It is what kernels that do are compared with."""
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "eos_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps(model | shape | heads))
    config = EngineConfig(
        str(tmp_path), load_format="dummy", device="cpu", kernels="cpu", threads=1,
        deterministic=True,
    )  # fmt: skip
    comparison = compare_with_torch(config, [3, 1, 4, 1, 5], silent)
    assert comparison.most_divergence < 1e-4
