"""How far two ways of computing one model are apart: divergence, agreement, perplexity.

A scorer gives the logits of every position of a text; `compare` sets two scorers' logits against
each other. `ruvon verify` compares kernels with their meaning in plain torch, bench/quality.py
compares formats of weights, and other engines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ruvon.config import EngineConfig
from ruvon.engine.backends import choose_backend, choose_device, step_limits
from ruvon.engine.batch import lay_out
from ruvon.engine.blocks import BlockPool
from ruvon.engine.grouped_pool import GroupedPool
from ruvon.engine.kv_cache import MemoryPlan, allocate_cache, free_for_cache, plan_memory
from ruvon.engine.resources import available_cores
from ruvon.engine.runner import Forward
from ruvon.engine.types import NO_BLOCKS, Chunk, Plan, PromptRow, Tables
from ruvon.models import load_model
from ruvon.models.checkpoint import open_checkpoint
from ruvon.telemetry import Progress, silent

Scorer: TypeAlias = Callable[[Sequence[int]], Tensor]
"""Token ids → float32 logits [T, V] in main memory, a row for each of them."""

ROWS = 64  # compared at once: float64 takes 400 kB a row where the vocabulary is 50,000


@contextmanager
def open_scorer(
    config: EngineConfig, longest: int, progress: Progress = silent
) -> Iterator[Scorer]:
    """Load what ``config`` names, to score texts of up to ``longest`` tokens.

    Raises ConfigError and LoadError as `start_engine` does.
    """
    config = replace(
        config,
        max_model_len=longest,
        max_num_seqs=1,
        max_num_batched_tokens=longest,
        kv_cache_memory=None,
    )
    device, threads = choose_device(config), config.threads or available_cores()
    checkpoint = open_checkpoint(config, progress)
    torch.set_num_threads(threads)
    with closing(choose_backend(checkpoint.spec, config, device, threads)) as backend:
        model = load_model(checkpoint, config, backend.ops, progress)
        memory = plan_memory(
            model.spec,
            config,
            backend.kv,
            weight_bytes=0,
            free_bytes=free_for_cache(backend.ops, config, model.spec),
        )
        limits = step_limits(model.spec, config, memory)
        cache = allocate_cache(model.spec, memory, device)
        forward = backend.make_step(model, cache, limits, progress).forward
        most = min(limits.logit_rows, limits.tokens)
        yield partial(score, forward, most, memory, device)


def score(
    forward: Forward, most: int, memory: MemoryPlan, device: torch.device, tokens: Sequence[int]
) -> Tensor:
    """A scorer over a cache that holds nothing else: ``most`` tokens at a time."""
    size, windows = memory.block_size, memory.windows
    grouped = GroupedPool(BlockPool(memory.num_blocks, size), windows, most)
    tables: Tables = tuple([[] for _ in windows])
    logits = []
    for start in range(0, len(tokens), most):
        piece = tuple(tokens[start : start + most])
        grown = grouped.grow(tables, start, len(tokens))
        assert grown is not None, "it is the only one"
        chunk, scored = Chunk(0, 0, piece, start, NO_BLOCKS, False), PromptRow(0, 0, piece, 0)
        plan = Plan(0, (chunk,), prompt_rows=(scored,))
        with torch.inference_mode():
            batch = lay_out(plan, {0: tables}, size, windows).to_batch(device)
            logits.append(forward(batch).to("cpu", copy=True))  # the next call reuses its memory
        grouped.leave(tables, start + len(piece))
    return torch.cat(logits)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Logits against reference logits, a number for each of N positions whose next token is
    known. Perplexities are over those tokens."""

    divergence_N: Tensor  # Kullback-Leibler, of the reference from what is compared, nats
    same_best_N: Tensor  # bool: the likeliest token is the same
    surprise_N: Tensor  # -log probability of the token that follows, nats

    @property
    def mean_divergence(self) -> float:
        return float(self.divergence_N.mean())

    @property
    def most_divergence(self) -> float:
        return float(self.divergence_N.max())

    def divergence_at(self, share: float) -> float:
        """The divergence that this share of positions stays below."""
        return float(self.divergence_N.quantile(share))

    @property
    def agreement(self) -> float:
        """The share of positions with the same likeliest token."""
        return float(self.same_best_N.double().mean())

    @property
    def perplexity(self) -> float:
        return float(self.surprise_N.mean().exp())


def compare(reference_TV: Tensor, logits_TV: Tensor, tokens: Sequence[int]) -> Comparison:
    """Logits of a text's positions, against a reference's; the last has no next token, and is
    left out."""
    targets = torch.tensor(tokens[1:])
    parts = (torch.split(t, ROWS) for t in (reference_TV[:-1], logits_TV[:-1], targets))
    return join(compare_rows(*part) for part in zip(*parts, strict=True))


def compare_rows(reference_NV: Tensor, logits_NV: Tensor, targets_N: Tensor) -> Comparison:
    p_NV, q_NV = (logits.double().log_softmax(-1) for logits in (reference_NV, logits_NV))
    return Comparison(
        divergence_N=(p_NV.exp() * (p_NV - q_NV)).sum(-1),
        same_best_N=p_NV.argmax(-1) == q_NV.argmax(-1),
        surprise_N=-q_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1),
    )


def join(comparisons: Iterable[Comparison]) -> Comparison:
    """Several texts as one."""
    parts = list(comparisons)
    return Comparison(
        torch.cat([part.divergence_N for part in parts]),
        torch.cat([part.same_best_N for part in parts]),
        torch.cat([part.surprise_N for part in parts]),
    )
