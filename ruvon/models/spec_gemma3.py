"""What Gemma 3's text models say of themselves in config.json and in GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ruvon.errors import LoadError
from ruvon.models.rope import RopeSpec, rope_from_config

GEMMA3 = "Gemma3ForCausalLM"
PATTERN = 6  # of so many layers the last sees everything, unless stated otherwise
FAR, NEAR = 1_000_000.0, 10_000.0  # theta of layers that see everything, and of those that do not
LARGEST = 62  # layers of the 27B model, whose scale GGUF does not state

UNSERVED = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "hidden_activation": "gelu_pytorch_tanh",
}
"""What none of the text models has, and the value that asks for nothing."""


def fields_from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelSpec`."""
    for key, usual in UNSERVED.items():
        if config.get(key) not in (None, usual):
            raise LoadError(f"config.json: {key} {config[key]!r} is not supported")
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or 256
    far, near = (_rope(config, kind, head_dim) for kind in ("full_attention", "sliding_attention"))
    bias = config.get("attention_bias") or False
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "intermediate_size": config["intermediate_size"],
        "max_positions": config["max_position_embeddings"],  # after scaling
        "norm": "rms",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": "gelu_tanh_gated",
        "rope": far,
        "local_rope": near,
        "learned_positions": False,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": False,
        "qk_norm": True,
        "windows": _windows(config, layers),
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "query_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
    }


def _rope(config: Mapping[str, Any], kind: str, head_dim: int) -> RopeSpec:
    """The rotation of one kind of layer: by its kind in ``rope_parameters``, and by the older
    ``rope_theta`` and ``rope_scaling``, which are those of layers that see everything and of which
    the second wins, and ``rope_local_base_freq``."""
    far, by_kind = kind == "full_attention", config.get("rope_parameters") or {}
    if strangers := set(by_kind) - {"full_attention", "sliding_attention"}:
        raise LoadError(f"config.json: rope_parameters {sorted(strangers)} of no kind of layer")
    parameters = dict(by_kind.get(kind) or {})
    if far:
        parameters |= config.get("rope_scaling") or {}
    theta = config.get("rope_theta" if far else "rope_local_base_freq") or (FAR if far else NEAR)
    told = {"rope_theta": theta, **parameters}
    return rope_from_config({**config, "rope_parameters": told, "rope_scaling": None}, head_dim)


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    pattern = config.get("sliding_window_pattern") or PATTERN
    slides = [(i + 1) % pattern != 0 for i in range(layers)]
    kinds = config.get("layer_types") or [
        "sliding_attention" if slide else "full_attention" for slide in slides
    ]
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise LoadError(f"config.json: layer_types {sorted(unknown)} are not supported")
    window: int = config.get("sliding_window", 4096) or 0
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def fields_from_gguf(
    metadata: Mapping[str, Any], hidden: int, heads: int, head_dim: int
) -> dict[str, Any]:
    """Those fields of `ModelSpec` that other models' metadata say in other ways."""
    arch, layers = "gemma3", metadata["gemma3.block_count"]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if metadata.get(f"{arch}.{key}"):
            raise LoadError(f"{arch}.{key} {metadata[f'{arch}.{key}']} is not supported")
    pattern = metadata.get(f"{arch}.attention.sliding_window_pattern", PATTERN)
    if not isinstance(pattern, list):
        pattern = [(i + 1) % pattern != 0 for i in range(layers)]
    window = metadata[f"{arch}.attention.sliding_window"]
    per_query = hidden // heads if layers == LARGEST else head_dim
    return {
        "max_positions": metadata[f"{arch}.context_length"],
        "activation": "gelu_tanh_gated",
        "windows": tuple(window if slides else 0 for slides in pattern),
        "local_rope": RopeSpec(float(metadata.get(f"{arch}.rope.freq_base_swa", NEAR)), head_dim),
        "query_scale": per_query**-0.5,
    }
