"""The KV cache: how many blocks fit in the memory given, and the tensors themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ruvon.config import EngineConfig, parse_size
from ruvon.engine.grouped_pool import longest_chunk, longest_that_fits, most_blocks
from ruvon.engine.resources import available_memory
from ruvon.errors import ConfigError
from ruvon.kernels.ops import Ops
from ruvon.models.cache_groups import cache_groups, layers_a_block, of_stage, place_of
from ruvon.models.spec import ModelSpec

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register

Cache: TypeAlias = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, both [B, G, P, D]."""


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How a table of kernels wants keys and values stored."""

    dtype: torch.dtype
    multiple: int = 1  # heads are padded with zeros to a multiple of so many dims

    def head_dim(self, spec: ModelSpec) -> int:
        return math.ceil(spec.head_dim / self.multiple) * self.multiple


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What start-up decided about memory, in bytes and tokens."""

    weight_bytes: int
    block_bytes: int  # keys and values of as many layers as a block holds
    block_size: int
    num_blocks: int  # to give out: block 0 is nobody's
    max_model_len: int
    kv: KVFormat
    windows: tuple[int, ...] = (0,)  # of the cache groups

    @property
    def num_tokens(self) -> int:
        """How many the cache holds, of sequences of the greatest length."""
        return int(self.max_concurrency * self.max_model_len)

    @property
    def dtype(self) -> str:
        """Of the cache."""
        return str(self.kv.dtype).removeprefix("torch.")

    @property
    def cache_bytes(self) -> int:
        return (self.num_blocks + 1) * self.block_bytes

    @property
    def max_concurrency(self) -> float:
        """How many sequences of the greatest length the cache holds at once, while each computes
        its last tokens one by one."""
        return self.num_blocks / most_blocks(self.max_model_len, self.block_size, self.windows, 1)


def plan_memory(
    spec: ModelSpec,
    config: EngineConfig,
    kv: KVFormat,
    *,
    weight_bytes: int,
    free_bytes: int,
    held: range | None = None,
) -> MemoryPlan:
    """Fit blocks into ``--kv-cache-memory``, or into ``free_bytes`` where that is not given, and
    the longest sequence into the blocks. ``spec`` has the heads of this rank, ``held`` are the
    layers of its stage, None all: there is no cache for others.

    Raises:
        ConfigError: the model has no such positions, or one sequence of ``--max-model-len`` tokens
            does not fit; without that flag, if not even one block does.
    """
    groups = cache_groups(spec)
    windows = tuple(group.window for group in groups)
    layout = config.block_size, windows, longest_chunk(config)
    longest = longest_sequence(spec, config)
    layers = layers_a_block(groups if held is None else of_stage(groups, held))
    numbers = 2 * layers * spec.num_kv_heads * kv.head_dim(spec)
    block_bytes = config.block_size * numbers * kv.dtype.itemsize
    if config.kv_cache_memory is None:
        # Nothing could use more than every sequence at its longest.
        useful = config.largest_step.sequences * most_blocks(longest, *layout)
        num_blocks = min(free_bytes // block_bytes - 1, useful)
    else:
        num_blocks = parse_size(config.kv_cache_memory) // block_bytes - 1
    wanted = math.ceil((config.max_model_len or 1) / config.block_size) * config.block_size
    needed = most_blocks(wanted, *layout)
    if num_blocks < needed:
        given = config.kv_cache_memory or f"what may be used of free memory ({free_bytes:,} bytes)"
        holds = longest_that_fits(num_blocks, longest, *layout)
        raise ConfigError(
            f"--kv-cache-memory: {given} holds {holds} tokens, but one sequence of {wanted} takes "
            f"{(needed + 1) * block_bytes:,} bytes; give more memory or a smaller --max-model-len"
        )
    return MemoryPlan(
        weight_bytes=weight_bytes,
        block_bytes=block_bytes,
        block_size=config.block_size,
        num_blocks=num_blocks,
        max_model_len=longest_that_fits(num_blocks, longest, *layout),
        kv=kv,
        windows=windows,
    )


def longest_sequence(spec: ModelSpec, config: EngineConfig) -> int:
    """``--max-model-len``, or all positions the model has."""
    if config.max_model_len is None:
        return spec.max_positions
    if config.max_model_len > spec.max_positions:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the model's "
            f"{spec.max_positions} positions"
        )
    return config.max_model_len


def allocate_cache(
    spec: ModelSpec, plan: MemoryPlan, device: torch.device, held: range | None = None
) -> Cache:
    """Zeroed tensors for every layer, or for those ``held`` by this stage; layers of different
    groups share theirs, see `cache_groups`. Zeros matter: a kernel may read past the end of a
    context and weigh it with nothing, and nothing times NaN is NaN.

    Raises ConfigError if the system does not give that much memory.
    """
    held = range(spec.num_layers) if held is None else held
    groups = of_stage(cache_groups(spec), held)
    places = [place_of(groups, layer)[1] for layer in held]
    shape = (plan.num_blocks + 1, spec.num_kv_heads, plan.block_size, plan.kv.head_dim(spec))
    dtype, layers = plan.kv.dtype, layers_a_block(groups)
    try:
        if device.type == "cpu":
            cpu = [(lazy_zeros(shape, dtype), lazy_zeros(shape, dtype)) for _ in range(layers)]
            return [cpu[place] for place in places]
        zeros = torch.zeros((layers, 2, *shape), dtype=dtype, device=device)
        return [(zeros[place, 0], zeros[place, 1]) for place in places]
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ConfigError(
            f"there is no memory for a cache of {plan.cache_bytes:,} bytes; give a smaller "
            "--kv-cache-memory"
        ) from error


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A zeroed CPU tensor that takes no memory before it is written to, which torch's own does."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    offset = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[offset : offset + size]).view(dtype).view(shape)


def free_for_cache(ops: Ops, config: EngineConfig, spec: ModelSpec, sharers: int = 1) -> int:
    """Bytes that a cache of no stated size may take, now that the weights are in place. Main memory
    is for as many caches as there are ``sharers``, and a GPU's for one.

    Raises ConfigError where a stated size is more than there is, or steps alone take more than a
    GPU has left.
    """
    if ops.device.type == "cpu":
        free = available_memory() // sharers
        check_stated(config, free)
        # Pages that were never written cost nothing, but a full cache must leave room for others.
        return int(config.cpu_memory_utilization * free)
    torch.cuda.empty_cache()  # what loading took for a while, quantizing above all
    free, total = torch.cuda.mem_get_info(ops.device)
    check_stated(config, free)
    planned = int(total * config.gpu_memory_utilization) - (total - free)
    needed = step_bytes(spec, config, ops.dtype)
    if planned <= needed and config.kv_cache_memory is None:
        sequences, tokens = config.largest_step
        raise ConfigError(
            f"steps of {sequences} sequences and {tokens} tokens take some {needed:,} bytes, and "
            f"--gpu-memory-utilization leaves {max(planned, 0):,} beside the weights; give smaller "
            "--max-num-seqs and --max-num-batched-tokens"
        )
    return max(planned - needed, 0)


def check_stated(config: EngineConfig, free: int) -> None:
    stated = config.kv_cache_memory
    if stated is not None and parse_size(stated) > free:
        raise ConfigError(
            f"--kv-cache-memory: {stated} is more than the {free:,} bytes of memory that are free"
        )


def step_bytes(spec: ModelSpec, config: EngineConfig, dtype: torch.dtype) -> int:
    """A generous estimate of the largest step's temporaries on a GPU. All of it there is twice, for
    graphs have memory of their own and so have steps without one: for each token some ten vectors
    as wide as the hidden state and four as the MLP (of a mixture, two and four for each expert that
    it goes through), and for each sequence its float32 logits.
    Beside them is what the sampler keeps about each token of the vocabulary, 4 bytes a sequence,
    and one weight made plain, if weights may be codes: see `ruvon.kernels.linear`."""
    sequences, tokens = config.largest_step
    through = 1 if spec.experts is None else spec.experts.top_k
    hidden = 10 * spec.hidden_size + (0 if spec.experts is None else 2 * through * spec.hidden_size)
    per_token = (hidden + 4 * through * spec.intermediate_size) * dtype.itemsize
    per_sequence = 4 * spec.vocab_size
    codes = config.quantization != "none"
    plain = 2 * spec.hidden_size * spec.intermediate_size * dtype.itemsize if codes else 0
    return 2 * (tokens * per_token + sequences * per_sequence + plain) + sequences * per_sequence
