"""How many sequences a KV cache holds at once, with a block table for each cache group and without.

    python bench/capacity.py

Nothing is loaded: this is `plan_memory` for the shapes of some models, keys and values in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ruvon.config import EngineConfig
from ruvon.engine.kv_cache import KVFormat, MemoryPlan, plan_memory
from ruvon.models.spec import ModelSpec, spec_from_config

LENGTHS = (2048, 8192, 32768, 131072)


@dataclass(frozen=True)
class Shape:
    """A model's keys and values."""

    windows: tuple[int, ...]
    kv_heads: int
    head_dim: int
    max_positions: int
    memory: str


SHAPES = {
    "gpt-oss-20b": Shape((128, 0) * 12, 8, 64, 131072, "40GiB"),
    "Gemma 3 4B": Shape(((1024,) * 5 + (0,)) * 5 + (1024,) * 4, 4, 256, 131072, "8GiB"),
    "Mistral 7B": Shape((4096,) * 32, 8, 128, 32768, "8GiB"),
}


def main() -> None:
    print(f"| model | groups see | cache | {' | '.join(f'{n:,} tokens' for n in LENGTHS)} |")
    print("|---|---|---:|" + "---:|" * len(LENGTHS))
    for name, shape in SHAPES.items():
        for windows in (shape.windows, (0,) * len(shape.windows)):
            print_row(name, shape, plan(shape, windows))


def plan(shape: Shape, windows: tuple[int, ...]) -> MemoryPlan:
    spec: ModelSpec = spec_from_config(
        {
            "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048,
            "intermediate_size": 2048, "num_hidden_layers": len(windows),
            "num_attention_heads": shape.kv_heads, "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim, "max_position_embeddings": shape.max_positions,
            "rms_norm_eps": 1e-5, "hidden_act": "silu",
        }
    )  # fmt: skip
    config = EngineConfig(device="cuda", kv_cache_memory=shape.memory)
    return plan_memory(
        replace(spec, windows=windows), config, KVFormat(torch.bfloat16),
        weight_bytes=0, free_bytes=0,
    )  # fmt: skip


def print_row(name: str, shape: Shape, plan: MemoryPlan) -> None:
    counts = [
        f"{replace(plan, max_model_len=length).max_concurrency:.1f}"
        if length <= shape.max_positions
        else ""
        for length in LENGTHS
    ]
    seen = ", ".join(str(window or "all") for window in plan.windows)
    print(f"| {name} | {seen} | {shape.memory} | {' | '.join(counts)} |")


if __name__ == "__main__":
    main()
