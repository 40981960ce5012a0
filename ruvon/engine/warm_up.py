"""Steps that nobody asked for: what happens once happens at start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ruvon.config import EngineConfig
from ruvon.engine.runner import Runner
from ruvon.engine.types import Blocks, Chunk, NewSequence, Plan, PromptRow, SamplingParams

if TYPE_CHECKING:
    from ruvon.engine.gpu.runner import GpuRunner

RARE = (
    SamplingParams(typical_p=0.5, bad_words=((0,), (0, 0)), logprobs=1),
    SamplingParams(temperature=0, presence_penalty=1, logit_bias={0: 1.0}, min_tokens=1),
)
"""Sampling that a GPU is asked for once at start: what is loaded at its first use is there then."""

SCORED = (1, 2, 16, 32, 64, 128, 512)
"""Numbers of rows for which a GPU's products differ; beyond the last they do not."""


def scoring_plans(longest: int, block_size: int, num_groups: int = 1) -> Iterator[Plan]:
    """Prompts to score which between them need every variant of a kernel that scoring ever will,
    so that none is compiled while somebody waits: graphs need those of their own sizes only."""
    for num_tokens in sorted({min(size, longest) for size in SCORED}):
        tokens = (0,) * num_tokens
        blocks = first_blocks(num_tokens, block_size, num_groups)
        new = NewSequence(0, SamplingParams(temperature=0), num_tokens, 0)
        chunk = Chunk(0, 0, tokens, 0, blocks, False)
        yield Plan(0, (chunk,), (new,), prompt_rows=(PromptRow(0, 0, tokens, 0),))


def first_blocks(num_tokens: int, block_size: int, num_groups: int) -> Blocks:
    """Blocks for a sequence of a single step: the same in all groups, for a layer reads what it has
    just written, and nobody what the last one leaves."""
    return (tuple(range(1, -(-num_tokens // block_size) + 1)),) * num_groups


def warm_up(runner: Runner | GpuRunner, config: EngineConfig, num_groups: int = 1) -> None:
    """Run a short step, so that what happens once happens before any request: kernels compile,
    threads start, a model that cannot run fails. What it writes to the cache is overwritten."""
    runner.launch(short_step(config, SamplingParams(temperature=0), num_groups)).result()


def short_step(config: EngineConfig, sampling: SamplingParams, num_groups: int = 1) -> Plan:
    """One short prompt."""
    tokens = (0,) * min(config.block_size, config.largest_step.tokens)
    new = NewSequence(0, sampling, len(tokens), 0)
    blocks = first_blocks(len(tokens), config.block_size, num_groups)
    chunk = Chunk(0, 0, tokens, 0, blocks, True)
    return Plan(0, (chunk,), (new,))
