"""`ModelSpec`: everything the mathematics of a model depends on, read from config.json or GGUF.

What a checkpoint asks for and ruvon does not do is refused here, by name: a model that runs but
computes something else than its authors meant is the worst outcome.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ruvon.errors import LoadError
from ruvon.kernels.ops import Activation, ExpertsSpec
from ruvon.models import mixtures, spec_gemma3
from ruvon.models.rope import (
    LinearScaling,
    RopeSpec,
    YarnScaling,
    rope_from_config,
)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model's structure. Llama, Mistral and Qwen differ in these fields only, and so do the
    mixtures of experts from each other."""

    architecture: str  # as config.json names it; a key of `MODELS`
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of the MLP, or of one expert
    max_positions: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: Activation
    rope: RopeSpec | None
    learned_positions: bool
    qkv_bias: bool
    output_bias: bool  # of attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMS norm of each query and key head before rotation
    windows: tuple[int, ...]  # per layer, in tokens; 0 sees everything
    tie_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: str  # the checkpoint's own: "float32", "bfloat16" or "float16"
    experts: ExpertsSpec | None = None  # in place of every layer's MLP; each is its width wide
    sinks: bool = False  # a learned logit a head that joins the softmax and takes no value
    local_rope: RopeSpec | None = None  # of layers with a window, where it is another
    query_scale: float | None = None  # of attention; None: 1 / sqrt(head_dim)


ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def spec_from_config(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None = None
) -> ModelSpec:
    """From config.json; generation_config.json often knows more end-of-sequence tokens."""
    if mixtures.is_original(config):
        config = mixtures.from_original(config)
    if named := config.get("transformers_weights"):
        raise LoadError(f"config.json: transformers_weights {named!r} is not supported")
    try:
        architecture = _architecture(config)
        mixtures.check_quantization(config, architecture)
        fields = CONFIG_READERS[architecture](config)
        ends = _ends(config, "config.json") + _ends(generation or {}, "generation_config.json")
        ends += mixtures.ends(architecture, fields["vocab_size"])
        spec = ModelSpec(
            architecture=architecture,
            eos_token_ids=tuple(dict.fromkeys(ends)),
            dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
            **fields,
        )
    except KeyError as error:
        raise LoadError(f"config.json lacks {error}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise LoadError(f"config.json has a value that makes no sense ({error})") from None
    return checked(spec, "config.json")


def _architecture(config: Mapping[str, Any]) -> str:
    """``architectures[0]``, or what ``model_type`` implies in a config that was never a model's."""
    implied = MODEL_TYPES.get(config.get("model_type", ""))
    named = (config.get("architectures") or [implied])[0]
    if named not in CONFIG_READERS:
        asked = named or config.get("model_type")
        known = ", ".join(CONFIG_READERS)
        raise LoadError(f"config.json: architecture {asked!r} is not supported ({known} are)")
    if implied not in (None, named):
        raise LoadError(f"config.json: model_type {config['model_type']!r} contradicts {named!r}")
    return str(named)


def _ends(stated: Mapping[str, Any], where: str) -> list[int]:
    value = stated.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(id) is int for id in ids):
        raise LoadError(f"{where}: eos_token_id {value!r} makes no sense")
    return ids


def _gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    _require(config, "scale_attn_weights", True)
    _require(config, "scale_attn_by_inverse_layer_idx", False)
    _require(config, "add_cross_attention", False)
    hidden, heads = config["n_embd"], config["n_head"]
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "num_layers": config["n_layer"],
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": config.get("n_inner") or 4 * hidden,
        "max_positions": config["n_positions"],
        "norm": "layer",
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "activation": _activation(config.get("activation_function", "gelu_new")),
        "rope": None,
        "learned_positions": True,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "windows": for_each_layer(0, config["n_layer"]),
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def _llama_family(config: Mapping[str, Any]) -> dict[str, Any]:
    architecture = _architecture(config)
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise LoadError(f"config.json: hidden_act {activation!r} is not supported (silu is)")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or HEAD_DIMS.get(architecture) or hidden // heads
    rope = rope_from_config(config, head_dim)
    reads_bias = architecture not in ("MistralForCausalLM", "Qwen2ForCausalLM")
    bias = (reads_bias and config.get("attention_bias")) or False
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "intermediate_size": config["intermediate_size"],
        "max_positions": max_positions(config["max_position_embeddings"], rope),
        "norm": "rms",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": "silu_gated",
        "rope": rope,
        "learned_positions": False,
        "qkv_bias": bias or architecture == "Qwen2ForCausalLM",
        "output_bias": bias,
        "mlp_bias": (architecture == "LlamaForCausalLM" and config.get("mlp_bias")) or False,
        "qk_norm": architecture in QK_NORM,
        "windows": _windows(config, architecture),
        "tie_embeddings": config.get("tie_word_embeddings") or False,
    }


def _qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    _require(config, "decoder_sparse_step", 1)
    if dense := config.get("mlp_only_layers"):
        raise LoadError(f"config.json: mlp_only_layers {dense!r} are not supported (none are)")
    experts = ExpertsSpec(
        num_experts=mixtures.num_experts(config),
        top_k=config["num_experts_per_tok"],
        width=config["moe_intermediate_size"],
        activation="silu_gated",
        renormalize=bool(config.get("norm_topk_prob", False)),
    )
    fields = _llama_family({**config, "intermediate_size": experts.width})
    return {**fields, "experts": experts}


def _gpt_oss(config: Mapping[str, Any]) -> dict[str, Any]:
    _require(config, "swiglu_limit", 7.0)
    _require(config, "swiglu_alpha", 1.702)
    experts = ExpertsSpec(
        num_experts=mixtures.num_experts(config),
        top_k=config.get("num_experts_per_tok") or config["experts_per_token"],
        width=config["intermediate_size"],
        activation="swiglu_clamped",
    )
    fields = _llama_family(
        {"rms_norm_eps": 1e-5, "attention_bias": True, "rope_theta": 150_000.0, **config}
    )
    if fields["rope"].scaling is None:  # all there are have YaRN: its key was not found
        raise LoadError("config.json lacks 'rope_parameters' (or the older 'rope_scaling')")
    return {**fields, "experts": experts, "mlp_bias": True, "sinks": True}


def _gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    for_each_layer(0, config["num_hidden_layers"])  # not more than make sense
    return spec_gemma3.fields_from_config(config)


HEAD_DIMS = {"Qwen3ForCausalLM": 128, "GptOssForCausalLM": 64}  # where a config does not say
QK_NORM = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def max_positions(stated: int, rope: RopeSpec | None) -> int:
    """Scaled checkpoints may state the length before scaling: always, where that is linear, and
    with YaRN to leave the users of short prompts alone."""
    scaling = None if rope is None else rope.scaling
    if isinstance(scaling, YarnScaling | LinearScaling):
        return max(stated, int((scaling.original_positions or stated) * scaling.factor))
    return stated


def _windows(config: Mapping[str, Any], architecture: str) -> tuple[int, ...]:
    layers: int = config["num_hidden_layers"]
    everything = for_each_layer(0, layers)
    window: int = config.get("sliding_window", 4096) or 0
    match architecture:
        case "LlamaForCausalLM":
            return everything
        case "MistralForCausalLM":
            return for_each_layer(window, layers)
        case "GptOssForCausalLM":
            window, slides = int(config["sliding_window"]), [i % 2 == 0 for i in range(layers)]
        case _ if not config.get("use_sliding_window", False):
            return everything
        case "Qwen3MoeForCausalLM":  # all layers, unlike the dense ones
            return for_each_layer(window, layers)
        case _:
            slides = [i >= config.get("max_window_layers", 28) for i in range(layers)]
    kinds = config.get("layer_types") or [
        "sliding_attention" if slide else "full_attention" for slide in slides
    ]
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise LoadError(f"config.json: layer_types {sorted(unknown)} are not supported")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def for_each_layer(window: int, layers: int) -> tuple[int, ...]:
    if type(layers) is not int or layers > MOST_LAYERS:
        raise ValueError(f"{layers!r} layers")
    return (window,) * layers


def _activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise LoadError(f"config.json: activation {name!r} is not supported ({known} are)")
    return ACTIVATIONS[name]


def _require(config: Mapping[str, Any], key: str, value: object) -> None:
    if config.get(key, value) != value:
        raise LoadError(f"config.json: {key} {config[key]!r} is not supported ({value!r} is)")


CONFIG_READERS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "GPT2LMHeadModel": _gpt2,
    "LlamaForCausalLM": _llama_family,
    "MistralForCausalLM": _llama_family,
    "Qwen2ForCausalLM": _llama_family,
    "Qwen3ForCausalLM": _llama_family,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "GptOssForCausalLM": _gpt_oss,
    spec_gemma3.GEMMA3: _gemma3,
}

MODEL_TYPES: Mapping[str, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "gemma3_text": spec_gemma3.GEMMA3,
}

MOST_LAYERS = 2**12
MOST_POSITIONS = 2**24  # more than any model has
MOST_HEAD_DIM = 2**12
MOST_ROTATED = 2**31  # positions times a head's size: rotary tables are made for all of them
SIZES = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "intermediate_size", "max_positions",
)  # fmt: skip
TYPES: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias", "tie_embeddings"), bool),
    "norm_eps": (float, int),
    "dtype": str,
}


def checked(spec: ModelSpec, where: str) -> ModelSpec:
    for name in SIZES:
        if type(size := getattr(spec, name)) is not int or not 0 < size <= sys.maxsize:
            raise LoadError(f"{where}: {name} {size!r} makes no sense")
    for name, kind in TYPES.items():
        if not isinstance(value := getattr(spec, name), kind):
            raise LoadError(f"{where}: {name} {value!r} makes no sense")
    if spec.experts is not None and not 0 < spec.experts.top_k <= spec.experts.num_experts:
        raise LoadError(
            f"{where}: {spec.experts.top_k} of {spec.experts.num_experts} experts a token make no "
            "sense"
        )
    if spec.rope is not None and spec.head_dim % 2:
        raise LoadError(f"{where}: heads of {spec.head_dim} cannot be rotated in pairs")
    if spec.head_dim > MOST_HEAD_DIM:
        raise LoadError(f"{where}: heads of {spec.head_dim} make no sense")
    most = min(MOST_POSITIONS, MOST_ROTATED // spec.head_dim)
    if spec.max_positions > most:
        raise LoadError(f"{where}: a context of {spec.max_positions} tokens makes no sense")
    if spec.num_heads % spec.num_kv_heads:
        raise LoadError(
            f"{where}: {spec.num_heads} attention heads do not divide over "
            f"{spec.num_kv_heads} key/value heads"
        )
    if len(spec.windows) != spec.num_layers:
        raise LoadError(
            f"{where}: layer_types names {len(spec.windows)} of {spec.num_layers} layers"
        )
    return spec
