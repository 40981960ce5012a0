"""The whole of `ruvon verify`: one model answers in every way, loaded again too, and beside plain
torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from ruvon.config import EngineConfig
from ruvon.engine.startup import LoadedEngine, start_engine
from ruvon.errors import ConfigError
from ruvon.models.checkpoint import open_checkpoint
from ruvon.models.tokenizer import Tokenizer
from ruvon.telemetry import Progress, silent
from ruvon.verify.cases import ALONE, CASES, Case, Row, judge, run
from ruvon.verify.quality import Comparison, compare, open_scorer
from ruvon.verify.requests import TEXT, Requests, make_jobs

LONGEST = 512
"""Tokens of the longest request, unless the model has fewer positions or blocks are large."""


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
    with closing(start_engine(config, progress)) as loaded:
        room = room_for_prompts(loaded.memory.max_model_len, tokens)
        jobs = make_jobs(loaded.tokenizer, number, tokens, room, loaded.memory.block_size)
        report = Report(
            model=loaded.checkpoint.name,
            tokenizer=loaded.tokenizer,
            device=loaded.device,
            kernels=loaded.kernels,
            dtype=loaded.dtype,
            threads=loaded.threads,
            promised=loaded.batch_invariant,
            rows=check_cases(loaded, jobs, progress),
        )
        text = loaded.tokenizer.encode(TEXT)[: loaded.memory.max_model_len]
    del loaded  # its weights too, before others are loaded
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


def check_cases(loaded: LoadedEngine, jobs: Requests, progress: Progress) -> list[Row]:
    """Everything that one loaded model can show."""
    rows: list[Row] = []
    for i, case in enumerate((ALONE, *CASES)):
        progress(case.name, i / (len(CASES) + 1))
        outcome = run(case, loaded, jobs)
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
        with closing(start_engine(replace(config, threads=threads), progress)) as loaded:
            progress(case.name, 0.0)
            rows.append(judge(case, report.rows[0].outcome, run(case, loaded, jobs)))
    return rows


def other_teams(threads: int) -> list[int]:
    """Numbers of threads to compare with: one, and one fewer, which shares work out unevenly."""
    return sorted({1, threads - 1} - {0, threads}) or [2]


def compare_with_torch(config: EngineConfig, text: Sequence[int], progress: Progress) -> Comparison:
    """The kernels against the plain meaning of the same weights."""
    plain = replace(config, kernels="torch", cpu_isa="auto", dtype="float32", deterministic=False)
    with open_scorer(config, len(text), progress) as scorer:
        logits = scorer(text)
    with open_scorer(plain, len(text), progress) as scorer:
        return compare(scorer(text), logits, text)
