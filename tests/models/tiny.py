"""Tiny random checkpoints in Hugging Face's form, made by transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ruvon.config import EngineConfig
from ruvon.kernels.mesh import ALONE, Mesh
from ruvon.kernels.reference import make_torch_ops
from ruvon.models import Model, load_model
from ruvon.models.checkpoint import open_checkpoint
from ruvon.telemetry import Progress, silent

VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {**LINEAR, "rope_type": "dynamic"}
EXPERTS = {
    **SHAPE,
    "head_dim": 32,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=128,
        eos_token_id=1,
        bos_token_id=0,
    ),
    "gpt2-untied": GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_inner=96,
        n_layer=2,
        n_head=4,
        n_positions=64,
        activation_function="relu",
        tie_word_embeddings=False,
        eos_token_id=1,
        bos_token_id=0,
    ),
    "llama2": LlamaConfig(**SHAPE),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True, head_dim=8, rms_norm_eps=1e-5),
    "llama-biased": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama3": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama-linear": LlamaConfig(**SHAPE, rope_parameters=LINEAR),
    "llama-yarn": LlamaConfig(**SHAPE, rope_parameters=YARN),
    "mistral": MistralConfig(**SHAPE, sliding_window=7),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2-window": Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "gemma3": Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 4, "hidden_size": 48},
        head_dim=32,
        sliding_window=7,
        sliding_window_pattern=2,
        query_pre_attn_scalar=20,
        rope_parameters={
            "full_attention": {**LINEAR, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma3-untied": Gemma3TextConfig(
        **SHAPE,
        head_dim=16,
        sliding_window=5,
        sliding_window_pattern=2,
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,
    ),
    "qwen3-moe": Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True),
    "qwen3-moe-plain": Qwen3MoeConfig(**EXPERTS, use_sliding_window=True, sliding_window=7),
}


def make_reference(name: str, **changes: int) -> PreTrainedModel:
    """transformers' model of a config above, with ``changes`` to it; all of it random, biases and
    norms too."""
    torch.manual_seed(1)
    config = copy.deepcopy(CONFIGS[name])
    for field, value in changes.items():
        setattr(config, field, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data + torch.randn_like(parameter) * 0.1
    return model.eval()


def load(
    path: Path,
    *,
    progress: Progress = silent,
    at_once: int = 1,
    mesh: Mesh = ALONE,
    **settings: object,
) -> Model:
    """Our model of a checkpoint, or a rank's share of it, on the plain kernels in float32."""
    config = EngineConfig(model=str(path), **settings)
    ops = make_torch_ops(torch.float32, torch.device("cpu"))
    return load_model(open_checkpoint(config, silent), config, ops, progress, at_once, mesh)
