"""The KV cache: how many blocks fit in the memory given, and the tensors themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ruvon.config import EngineConfig, parse_size
from ruvon.engine.resources import available_memory
from ruvon.errors import ConfigError
from ruvon.kernels.ops import Ops
from ruvon.models.spec import ModelSpec

CPU_SHARE = 0.25
"""Of the main memory available at start, what a cache of no stated size may take. Pages that were
never written cost nothing, but a cache that filled up must leave room for everybody else."""

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
    bytes_per_token: int  # keys and values, all layers
    block_size: int
    num_blocks: int
    max_model_len: int
    kv: KVFormat

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def dtype(self) -> str:
        """Of the cache."""
        return str(self.kv.dtype).removeprefix("torch.")

    @property
    def cache_bytes(self) -> int:
        return self.num_tokens * self.bytes_per_token

    @property
    def max_concurrency(self) -> float:
        """How many sequences of the greatest length the cache holds at once."""
        return self.num_tokens / self.max_model_len


def plan_memory(
    spec: ModelSpec,
    config: EngineConfig,
    kv: KVFormat,
    *,
    weight_bytes: int,
    free_bytes: int,
) -> MemoryPlan:
    """Fit blocks into ``--kv-cache-memory``, or into ``free_bytes`` where that is not given, and
    the longest sequence into the blocks.

    Raises:
        ConfigError: the model has no such positions, or one sequence of ``--max-model-len`` tokens
            does not fit; without that flag, if not even one block does.
    """
    longest = longest_sequence(spec, config)
    numbers_per_token = 2 * spec.num_layers * spec.num_kv_heads * kv.head_dim(spec)
    bytes_per_token = numbers_per_token * kv.dtype.itemsize
    block_bytes = config.block_size * bytes_per_token
    if config.kv_cache_memory is None:
        # Nothing could use more than every sequence at its longest.
        useful = config.largest_step.sequences * math.ceil(longest / config.block_size)
        num_blocks = min(free_bytes // block_bytes, useful)
    else:
        num_blocks = parse_size(config.kv_cache_memory) // block_bytes
    needed = math.ceil((config.max_model_len or config.block_size) / config.block_size)
    if num_blocks < needed:
        given = config.kv_cache_memory or f"what may be used of free memory ({free_bytes:,} bytes)"
        raise ConfigError(
            f"--kv-cache-memory: {given} holds {num_blocks * config.block_size} tokens, but one "
            f"sequence of {needed * config.block_size} takes {needed * block_bytes:,} bytes; "
            "give more memory or a smaller --max-model-len"
        )
    return MemoryPlan(
        weight_bytes=weight_bytes,
        bytes_per_token=bytes_per_token,
        block_size=config.block_size,
        num_blocks=num_blocks,
        max_model_len=min(longest, num_blocks * config.block_size),
        kv=kv,
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


def allocate_cache(spec: ModelSpec, plan: MemoryPlan, device: torch.device) -> Cache:
    """Zeroed tensors for every layer. Zeros matter: a kernel may read past the end of a context
    and weigh it with nothing, and nothing times NaN is NaN.

    Raises ConfigError if the system does not give that much memory.
    """
    shape = (plan.num_blocks, spec.num_kv_heads, plan.block_size, plan.kv.head_dim(spec))
    dtype, layers = plan.kv.dtype, spec.num_layers
    try:
        if device.type == "cpu":
            return [(lazy_zeros(shape, dtype), lazy_zeros(shape, dtype)) for _ in range(layers)]
        zeros = torch.zeros((layers, 2, *shape), dtype=dtype, device=device)
        return [(layer[0], layer[1]) for layer in zeros]
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


def free_for_cache(ops: Ops, config: EngineConfig, spec: ModelSpec) -> int:
    """Bytes that a cache of no stated size may take, now that the weights are in place.

    Raises ConfigError where a stated size is more than there is, or steps alone take more than a
    GPU has left.
    """
    if ops.device.type == "cpu":
        free = available_memory()
        check_stated(config, free)
        return int(CPU_SHARE * free)
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
    Beside them is what the sampler keeps about each token of the vocabulary, 4 bytes a sequence."""
    sequences, tokens = config.largest_step
    if not config.enable_chunked_prefill:
        tokens = max(tokens, longest_sequence(spec, config))
    through = 1 if spec.experts is None else spec.experts.top_k
    hidden = 10 * spec.hidden_size + (0 if spec.experts is None else 2 * through * spec.hidden_size)
    per_token = (hidden + 4 * through * spec.intermediate_size) * dtype.itemsize
    per_sequence = 4 * spec.vocab_size
    return 2 * (tokens * per_token + sequences * per_sequence) + sequences * per_sequence
