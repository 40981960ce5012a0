"""What a checkpoint says of a mixture of experts, and what only gpt-oss's checkpoints say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ruvon.errors import LoadError
from ruvon.kernels.ops import Activation, ExpertsSpec

GPT_OSS, QWEN3_MOE = "GptOssForCausalLM", "Qwen3MoeForCausalLM"

HARMONY_ENDS = (200002, 200012, 199999)
"""<|return|>, <|call|> and <|endoftext|>. Some checkpoints of gpt-oss leave the second out, and
then write on behind a tool call."""


def ends(architecture: str, vocab_size: int) -> list[int]:
    """Ends of sequence that a model has whatever its config says."""
    ids = HARMONY_ENDS if architecture == GPT_OSS else ()
    return [id for id in ids if id < vocab_size]


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of OpenAI's own layout of gpt-oss (``original/`` on the hub),
    which names no architecture."""
    named = config.get("architectures") or config.get("model_type")
    return not named and "num_experts" in config and "initial_context_length" in config


def from_original(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same in Hugging Face's words. What it leaves unsaid OpenAI's reference fixes."""
    trained, factor = config["initial_context_length"], config["rope_scaling_factor"]
    rope = {
        "rope_type": "yarn",
        "rope_theta": config["rope_theta"],
        "factor": factor,
        "original_max_position_embeddings": trained,
        "beta_slow": config["rope_ntk_alpha"],
        "beta_fast": config["rope_ntk_beta"],
        "truncate": False,
    }
    return {
        **config,
        "architectures": [GPT_OSS],
        "num_experts_per_tok": config["experts_per_token"],
        "max_position_embeddings": int(trained * factor),
        "rope_parameters": rope,
        "dtype": "bfloat16",
    }


def num_experts(config: Mapping[str, Any]) -> int:
    """Under either of the names that transformers' versions give it."""
    stated: int | None = config.get("num_local_experts") or config.get("num_experts")
    if stated is None:
        raise KeyError("num_local_experts")
    return stated


def check_quantization(config: Mapping[str, Any], architecture: str) -> None:
    """Raises LoadError for a quantized checkpoint, unless it is gpt-oss in MXFP4.

    Whichever of that one's modules are named as not converted, their tensors say the same: what is
    converted has blocks and scales. Nothing but experts can be.
    """
    if not (stated := config.get("quantization_config")):
        return
    method = stated.get("quant_method") if isinstance(stated, Mapping) else None
    if method != "mxfp4" or architecture != GPT_OSS:
        which = f" for {architecture}" if method == "mxfp4" else ""
        raise LoadError(f"config.json: quantization_config {method!r} is not supported{which}")
    kept = stated.get("modules_to_not_convert") or []
    if not isinstance(kept, list) or not all(isinstance(name, str) for name in kept):
        raise LoadError(f"config.json: modules_to_not_convert {kept!r} is not a list of names")


def experts_from_gguf(metadata: Mapping[str, Any], arch: str) -> ExpertsSpec | None:
    """From GGUF metadata; None for a model without experts."""
    if not (count := metadata.get(f"{arch}.expert_count", 0)):
        return None
    if (activation := GGUF_ACTIVATIONS.get(arch)) is None:
        raise LoadError(f"{arch}.expert_count: mixtures of experts are not supported here")
    for key, value in GGUF_FIXED.items():
        if metadata.get(f"{arch}.{key}", value) != value:
            raise LoadError(f"{arch}.{key} {metadata[f'{arch}.{key}']!r} is not supported")
    return ExpertsSpec(
        num_experts=count,
        top_k=metadata[f"{arch}.expert_used_count"],
        width=metadata[f"{arch}.expert_feed_forward_length"],
        activation=activation,
    )


GGUF_ACTIVATIONS: Mapping[str, Activation] = {"gpt-oss": "swiglu_clamped", "qwen3moe": "silu_gated"}
GGUF_FIXED = {"expert_shared_count": 0, "expert_weights_norm": True}


def windows_from_gguf(metadata: Mapping[str, Any], arch: str, layers: int) -> tuple[int, ...]:
    """Of an architecture whose layers take turns: the first slides, the second sees everything."""
    window = metadata[f"{arch}.attention.sliding_window"]
    pattern = metadata.get(f"{arch}.attention.sliding_window_pattern", 2)
    if isinstance(pattern, list):
        return tuple(window if slides else 0 for slides in pattern)
    return tuple(window if i % pattern < pattern - 1 else 0 for i in range(layers))
