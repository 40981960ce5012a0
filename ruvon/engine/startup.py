"""From settings to an engine that runs: device, kernels, weights, tokenizer, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ruvon.config import EngineConfig
from ruvon.engine.engine import Engine
from ruvon.engine.kv_cache import MemoryPlan, allocate_cache, free_for_cache, plan_memory
from ruvon.engine.machine import available_cores
from ruvon.engine.runner import Runner
from ruvon.engine.sampler import sample
from ruvon.engine.types import Chunk, Plan, SamplingParams, SamplingRow
from ruvon.errors import ConfigError
from ruvon.kernels.ops import Ops
from ruvon.kernels.reference import make_torch_ops
from ruvon.models import Model, load_model
from ruvon.models.chat import ChatFormat, load_chat
from ruvon.models.checkpoint import Checkpoint, open_checkpoint
from ruvon.models.tokenizer import Tokenizer, load_tokenizer
from ruvon.telemetry import Progress

LOGITS_BYTES = 64 << 20  # at once; only prompt logprobs want that many


@dataclass(frozen=True, slots=True)
class Started:
    """A loaded model, ready to run, and what was decided on the way."""

    engine: Engine
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    chat: ChatFormat
    memory: MemoryPlan
    device: str
    kernels: str  # the table's name
    dtype: str  # of the computation
    threads: int
    close: Callable[[], None]  # ends the runner's thread


def start_engine(config: EngineConfig, progress: Progress) -> Started:
    """Load what ``config`` names and make an engine of it.

    Raises `ConfigError` for a setting that cannot be honoured here, and `LoadError` for a
    checkpoint that cannot be used.
    """
    progress("opening model", 0.0)
    device = choose_device(config)
    threads = config.threads or available_cores()
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(config, progress)
    ops = choose_ops(config, device)
    model = load_model(checkpoint, config, ops, progress)
    progress("loading tokenizer", 0.0)
    tokenizer = load_tokenizer(checkpoint)
    chat = load_chat(tokenizer)
    progress("warming up", 0.0)
    memory = plan_memory(
        model.spec,
        config,
        ops.dtype,
        weight_bytes=sum(tensor.nbytes for tensor in distinct(tensors_of(model))),
        free_bytes=free_for_cache(device, config, model.spec),
    )
    eos_token_ids = tuple(dict.fromkeys((*model.spec.eos_token_ids, *tokenizer.eos_ids)))
    runner = make_runner(model, config, memory, ops, eos_token_ids)
    warm_up(runner, config)
    return Started(
        engine=Engine(
            runner,
            config,
            max_model_len=memory.max_model_len,
            num_blocks=memory.num_blocks,
            vocab_size=model.spec.vocab_size,
            eos_token_ids=eos_token_ids,
        ),
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        chat=chat,
        memory=memory,
        device=str(device),
        kernels=ops.name,
        dtype=str(ops.dtype).removeprefix("torch."),
        threads=threads,
        close=runner.close,
    )


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


def choose_ops(config: EngineConfig, device: torch.device) -> Ops:
    """The table of kernels that ``--kernels`` names, or the fastest for the device."""
    default_dtype = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, default_dtype if config.dtype == "auto" else config.dtype)
    kernels = config.kernels
    if kernels == "auto":
        kernels = "triton" if device.type == "cuda" else "torch"
    match kernels:
        case "triton":
            from ruvon.kernels.triton_ops import make_triton_ops  # triton is only on Linux

            return make_triton_ops(dtype, device)
        case _:
            return make_torch_ops(dtype, device)


def make_runner(
    model: Model,
    config: EngineConfig,
    memory: MemoryPlan,
    ops: Ops,
    eos_token_ids: tuple[int, ...],
) -> Runner:
    """The model over its cache, one step at a time."""
    cache = allocate_cache(model.spec, memory, ops.dtype, ops.device)
    most_rows = LOGITS_BYTES // (4 * model.spec.vocab_size)
    return Runner(
        partial(model.forward, cache=cache),
        partial(sample, eos_token_ids=eos_token_ids),
        block_size=config.block_size,
        device=ops.device,
        max_logit_rows=max(most_rows, config.max_num_seqs),
    )


def warm_up(runner: Runner, config: EngineConfig) -> None:
    """Run a short step, so that what happens once happens before any request: kernels compile,
    threads start, a model that cannot run fails. What it writes to the cache is overwritten."""
    tokens = [0] * min(config.block_size, config.max_num_batched_tokens)
    row = SamplingRow(0, SamplingParams(temperature=0), tokens, len(tokens), 0)
    chunk = Chunk(0, tuple(tokens), 0, [0], True)
    try:
        runner.launch(Plan(0, (chunk,), (row,))).result()
    except BaseException:
        runner.close()
        raise


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors held by a tree of dataclasses and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_of(item)


def distinct(tensors: Iterator[Tensor]) -> list[Tensor]:
    """Each tensor once: tied weights share theirs."""
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())
