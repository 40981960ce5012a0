"""Which kernels run a model: a table of operations, the form it wants the cache in, and how model
and cache become what the runner does in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, TypeAlias

import structlog
import torch
from torch import Tensor

from ruvon.config import EngineConfig
from ruvon.engine.kv_cache import Cache, KVFormat, MemoryPlan
from ruvon.engine.resources import cores_to_pin
from ruvon.engine.runner import Forward, Hidden
from ruvon.engine.sampler import sample
from ruvon.engine.types import SamplingRow, StepResult
from ruvon.errors import ConfigError
from ruvon.kernels.mesh import ALONE, Mesh
from ruvon.kernels.ops import Ops, StepLimits
from ruvon.kernels.reference import make_torch_ops
from ruvon.models import Model
from ruvon.models.layers import attention_spec
from ruvon.models.shares import Share, share_of
from ruvon.models.spec import ModelSpec
from ruvon.telemetry import Progress

log = structlog.get_logger(__name__)

FEWEST_CODES = 1 << 23
"""Smaller weights of a GGUF file are multiplied out on a GPU: reading half or a quarter of so few
bytes saves less than codes take to become numbers (docs/log.md)."""
LOGITS_BYTES = 64 << 20  # at once; only prompt logprobs want that many


def step_limits(spec: ModelSpec, config: EngineConfig, memory: MemoryPlan) -> StepLimits:
    """What the settings and the model's cache make of them."""
    sequences, tokens = config.largest_step
    bounded = min(LOGITS_BYTES // (4 * spec.vocab_size), tokens)
    return StepLimits(
        tokens=tokens,
        sequences=sequences,
        logit_rows=max(bounded, sequences),
        blocks_per_sequence=-(-memory.max_model_len // memory.block_size),
        cache_groups=len(memory.windows),
    )


Draw: TypeAlias = Callable[[Tensor, Sequence[SamplingRow], Sequence[int]], StepResult]
"""`ruvon.engine.sampler.sample`, or the same faster."""


class Step(NamedTuple):
    """What a runner does with a batch: compute logits, then draw from them; or hidden states."""

    forward: Forward
    draw: Draw
    hidden: Hidden


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to run any model."""

    ops: Ops
    kv: KVFormat
    make_step: Callable[[Model, Cache, StepLimits, Progress], Step]
    close: Callable[[], None]  # to be called when nothing runs any more
    pin_thread: Callable[[], None] = lambda: None  # first, by who runs steps
    takes_arrays: bool = False  # whether batches are to be numpy arrays, not tensors
    quantized: bool = False  # whether it computes with weights of 4 and 8 bits, or makes them plain
    graphs: bool = False  # whether whole steps are captured and replayed (`GpuRunner`)
    mesh: Mesh = ALONE  # for models; its functions may be captured like those of ``ops``


def choose_device(config: EngineConfig) -> torch.device:
    """What ``--device`` names, or a GPU where there is one and ``--kernels`` allows it."""
    has_gpu = torch.cuda.is_available()
    wants_gpu = config.device == "cuda" or config.kernels == "triton"
    if wants_gpu and not has_gpu:
        flag = "--device cuda" if config.device == "cuda" else "--kernels triton"
        raise ConfigError(f"{flag}: torch finds no CUDA device here")
    if wants_gpu or (config.device == "auto" and has_gpu and config.kernels != "cpu"):
        return torch.device("cuda")
    return torch.device("cpu")


def choose_backend(
    spec: ModelSpec,
    config: EngineConfig,
    device: torch.device,
    threads: int,
    mesh: Mesh = ALONE,
) -> Backend:
    """What ``--kernels`` names, or the fastest for the device that can run a rank's share of the
    model.

    Raises ConfigError if they cannot run it, or cannot promise what ``--deterministic`` asks.
    """
    backend = find_backend(share_of(spec, mesh), config, device, threads)
    if config.deterministic and not backend.ops.batch_invariant:
        backend.close()
        raise ConfigError(f"--deterministic: the kernels '{backend.ops.name}' do not promise that")
    return backend


def refuse_idle(spec: ModelSpec, config: EngineConfig, backend: Backend) -> None:
    """Raises ConfigError for a setting that would do nothing here, or nothing good."""
    ops, wanted = backend.ops, config.quantization
    if wanted in ("int8", "int4") and not backend.quantized:
        raise ConfigError(
            f"--quantization {wanted}: the kernels '{ops.name}' compute with plain weights, so it "
            "would cost quality and save nothing"
        )
    mixture = spec.experts is not None and not spec.sinks  # gpt-oss's come in four bits anyway
    if wanted in ("int8", "int4") and backend.graphs and mixture:
        raise ConfigError(
            f"--quantization {wanted}: a GPU computes the experts of a mixture as plain numbers or "
            "in MXFP4, so they would cost quality and save nothing"
        )
    if config.pin_threads == "on" and not backend.takes_arrays:
        raise ConfigError(f"--pin-threads on: the kernels '{ops.name}' have no threads of ours")
    if config.cpu_isa != "auto" and not backend.takes_arrays:
        raise ConfigError(f"--cpu-isa {config.cpu_isa} is for the kernels 'cpu', not '{ops.name}'")
    share = config.gpu_memory_utilization
    if ops.device.type == "cpu" and share != EngineConfig().gpu_memory_utilization:
        raise ConfigError(
            f"--gpu-memory-utilization {share}: there is no GPU in use; --kv-cache-memory is for "
            "main memory"
        )


def find_backend(share: Share, config: EngineConfig, device: torch.device, threads: int) -> Backend:
    default_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = default_dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    match config.kernels:
        case "torch":
            return torch_backend(share, dtype, device)
        case "triton":
            return triton_backend(share, dtype, device, config)
        case "cpu":
            return cpu_backend(share, config, threads)
    try:
        if device.type == "cuda":
            return triton_backend(share, dtype, device, config)
        return cpu_backend(share, config, threads)
    except ConfigError as error:
        if device.type == "cpu" and config.cpu_isa != "auto":
            raise  # who asks for instructions wants these kernels, and no slower ones
        log.warning("slow_kernels", kernels="torch", reason=str(error))
        return torch_backend(share, dtype, device)


def torch_backend(share: Share, dtype: torch.dtype, device: torch.device) -> Backend:
    """Nothing but torch: a mesh that can add up and norm in one launch is not asked to."""
    return eager(make_torch_ops(dtype, device), replace(share.mesh, add_norm=None))


def check_experts(spec: ModelSpec, ops: Ops) -> None:
    """Raises ConfigError for a mixture of experts that these kernels do not compute."""
    if spec.experts is not None and ops.experts is None:
        raise ConfigError(f"the kernels '{ops.name}' do not compute mixtures of experts")


def eager(ops: Ops, mesh: Mesh = ALONE) -> Backend:
    """The model's own Python, step by step."""
    return Backend(
        ops=ops,
        kv=KVFormat(ops.dtype),
        make_step=lambda model, cache, limits, progress: Step(
            partial(model.forward, cache=cache), sample, partial(model.hidden, cache=cache)
        ),
        close=lambda: None,
        mesh=mesh,
    )


def triton_backend(
    share: Share, dtype: torch.dtype, device: torch.device, config: EngineConfig
) -> Backend:
    """Raises ConfigError for a model that these kernels do not compute."""
    from ruvon.kernels.triton_ops import make_triton_ops  # triton is not on every platform

    asked = config.quantization in ("int8", "int4")
    ops = make_triton_ops(
        dtype,
        device,
        batch_invariant=config.deterministic,
        fewest_codes=0 if asked else FEWEST_CODES,
    )
    check_experts(share.spec, ops)
    return replace(eager(ops, share.mesh), graphs=True, quantized=True)


def cpu_backend(share: Share, config: EngineConfig, threads: int) -> Backend:
    """The compiled kernels, as a graph. Whatever ``--dtype`` keeps weights and cache in, they
    compute in float32; unasked, the cache is float16 and weights are as the checkpoint has them.

    Raises ConfigError for a model or setting that they do not do.
    """
    from ruvon.engine.cpu_sampler import CpuSampler  # as the kernels, not used by every backend
    from ruvon.kernels.cpu import CpuKernels
    from ruvon.kernels.cpu.formats import LANES
    from ruvon.kernels.cpu.operations import check_attention

    spec, mesh = share.local, share.mesh
    asked = None if config.dtype == "auto" else getattr(torch, config.dtype)
    kv = KVFormat(asked or torch.float16, multiple=LANES)
    shape = (0, spec.num_kv_heads, config.block_size, kv.head_dim(spec))
    for layer in range(spec.num_layers):
        check_attention(attention_spec(spec, layer), torch.empty(shape, device="meta"))
    isa = None if config.cpu_isa == "auto" else config.cpu_isa
    cores = cores_to_pin(threads, config.pin_threads)
    kernels = CpuKernels(threads, dense_dtype=asked, isa=isa, cores=cores, mesh=mesh)
    try:
        check_experts(spec, kernels.ops)
    except ConfigError:
        kernels.close()
        raise

    def capture(model: Model, cache: Cache, limits: StepLimits, progress: Progress) -> Step:
        graph = kernels.capture(model.forward, cache, limits, progress, draws=mesh.is_last)
        sampler = kernels.sampler(spec.vocab_size, limits.sequences, progress)
        # Few servers are asked for hidden states, but streams would wait while it is captured.
        every_row = replace(limits, logit_rows=limits.tokens)
        hidden = kernels.capture(model.hidden, cache, every_row, draws=False)
        return Step(graph.replay, CpuSampler(sampler, lambda: graph.argmax), hidden.replay)

    return Backend(
        kernels.ops,
        kv,
        capture,
        kernels.close,
        kernels.settle,
        takes_arrays=True,
        quantized=True,
        mesh=kernels.mesh,
    )
