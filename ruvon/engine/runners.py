"""A model over its cache, as what takes plans: on a CPU, or on a GPU in graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ruvon.config import EngineConfig
from ruvon.engine.backends import Backend, step_limits
from ruvon.engine.grammar import Grammars
from ruvon.engine.kv_cache import Cache, MemoryPlan, allocate_cache
from ruvon.engine.matching import Matchers
from ruvon.engine.resources import available_cores
from ruvon.engine.runner import Forward, Runner
from ruvon.engine.types import SamplingRow, StepResult
from ruvon.engine.warm_up import RARE, scoring_plans, short_step
from ruvon.kernels.ops import StepLimits
from ruvon.models import Model
from ruvon.telemetry import Progress

if TYPE_CHECKING:
    from ruvon.engine.gpu.runner import GpuRunner

MASK_THREADS = 4  # at most: of 16 masks more take as long again to wake as they save


def make_runner(
    model: Model,
    config: EngineConfig,
    memory: MemoryPlan,
    backend: Backend,
    grammars: Grammars,
    progress: Progress,
) -> Runner | GpuRunner:
    """The model over its cache, one step at a time."""
    limits = step_limits(model.spec, config, memory)
    cache = allocate_cache(model.spec, memory, backend.ops.device, model.held)
    if backend.graphs:
        matchers = gpu_matchers(grammars) if backend.mesh.is_last else None
        return make_gpu_runner(
            model, config, memory, cache, limits, grammars.eos_token_ids, matchers, progress
        )
    step = backend.make_step(model, cache, limits, progress)

    def sampler(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> StepResult:
        return step.draw(logits_LV, rows, grammars.eos_token_ids)

    return Runner(
        step.forward,
        sampler,
        hidden=step.hidden,
        block_size=config.block_size,
        windows=memory.windows,
        device=None if backend.takes_arrays else backend.ops.device,
        max_logit_rows=limits.logit_rows,
        at_start=backend.pin_thread,
        matchers=Matchers(grammars) if backend.mesh.is_last else None,
        samples=backend.mesh.is_last,
    )


def make_gpu_runner(
    model: Model,
    config: EngineConfig,
    memory: MemoryPlan,
    cache: Cache,
    limits: StepLimits,
    eos_token_ids: Sequence[int],
    matchers: Matchers | None,
    progress: Progress,
) -> GpuRunner:
    """``matchers`` are None on a stage before the last."""
    from ruvon.engine.gpu.runner import GpuRunner  # triton is not on every platform
    from ruvon.engine.gpu.scoring import Scorer

    device = model.ops.device
    scorer = Scorer(
        for_longest(partial(model.hidden, cache=cache), memory.max_model_len),
        None if matchers is None else model.logits,
        device=device,
        block_size=config.block_size,
        windows=memory.windows,
        max_logit_rows=limits.logit_rows,
    )
    progress("compiling kernels", 0.0)
    longest, num_groups = min(limits.tokens, memory.max_model_len), len(memory.windows)
    for plan in scoring_plans(longest, config.block_size, num_groups):
        (chunk,) = plan.chunks
        tables = {chunk.seq_id: tuple([[*blocks] for blocks in chunk.blocks])}
        with torch.inference_mode():
            scorer.score(plan, tables)
    runner = GpuRunner(
        partial(model.forward, cache=cache),
        scorer,
        device=device,
        block_size=config.block_size,
        windows=memory.windows,
        vocab_size=model.spec.vocab_size,
        max_model_len=memory.max_model_len,
        max_seqs=limits.sequences,
        max_tokens=limits.tokens,
        eos_token_ids=eos_token_ids,
        matchers=matchers,
        progress=progress,
    )
    for sampling in RARE:
        runner.launch(short_step(config, sampling, num_groups)).result()
    runner.start_counting()
    return runner


def gpu_matchers(grammars: Grammars) -> Matchers:
    """Which compute masks while the device computes logits."""
    return Matchers(grammars, min(max(available_cores() // 2, 1), MASK_THREADS), at_once=False)


def for_longest(forward: Forward, max_context: int) -> Forward:
    """``forward`` as if a context were always the longest, as it is for graphs: some kernels are
    compiled for it."""
    return lambda batch: forward(dataclasses.replace(batch, max_context=max_context))
