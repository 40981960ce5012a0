"""`ModelSpec`: everything the mathematics of a model depends on, read from config.json or GGUF.

What a checkpoint asks for and ruvon does not do is refused here, by name: a model that runs but
computes something else than its authors meant is the worst outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ruvon.errors import LoadError
from ruvon.kernels.ops import Activation
from ruvon.models.rope import (
    LinearScaling,
    RopeSpec,
    YarnScaling,
    rope_from_config,
    rope_from_gguf,
)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model's structure. Llama, Mistral and Qwen differ in these fields only."""

    architecture: str  # as config.json names it; a key of `MODELS`
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
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
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise LoadError(f"config.json: quantization_config {method!r} is not supported")
    if named := config.get("transformers_weights"):
        raise LoadError(f"config.json: transformers_weights {named!r} is not supported")
    try:
        architecture = _architecture(config)
        ends = _ids(config.get("eos_token_id")) + _ids((generation or {}).get("eos_token_id"))
        spec = ModelSpec(
            architecture=architecture,
            eos_token_ids=tuple(dict.fromkeys(ends)),
            dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
            **CONFIG_READERS[architecture](config),
        )
    except KeyError as error:
        raise LoadError(f"config.json lacks {error}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise LoadError(f"config.json has a value that makes no sense ({error})") from None
    return _checked(spec, "config.json")


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


def _ids(value: int | list[int] | None) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(id, int) for id in ids):
        raise TypeError(f"eos_token_id {value!r}")
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
        "windows": _for_each_layer(0, config["n_layer"]),
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def _llama_family(config: Mapping[str, Any]) -> dict[str, Any]:
    architecture = _architecture(config)
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise LoadError(f"config.json: hidden_act {activation!r} is not supported (silu is)")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    default_dim = 128 if architecture == "Qwen3ForCausalLM" else hidden // heads
    head_dim = config.get("head_dim") or default_dim
    rope = rope_from_config(config, head_dim)
    reads_bias = architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM")
    bias = (reads_bias and config.get("attention_bias")) or False
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "intermediate_size": config["intermediate_size"],
        "max_positions": _max_positions(config["max_position_embeddings"], rope),
        "norm": "rms",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": "silu_gated",
        "rope": rope,
        "learned_positions": False,
        "qkv_bias": bias or architecture == "Qwen2ForCausalLM",
        "output_bias": bias,
        "mlp_bias": (architecture == "LlamaForCausalLM" and config.get("mlp_bias")) or False,
        "qk_norm": architecture == "Qwen3ForCausalLM",
        "windows": _windows(config, architecture),
        "tie_embeddings": config.get("tie_word_embeddings") or False,
    }


def _max_positions(stated: int, rope: RopeSpec | None) -> int:
    """Scaled checkpoints may state the length before scaling: always, where that is linear, and
    with YaRN to leave the users of short prompts alone."""
    scaling = None if rope is None else rope.scaling
    if isinstance(scaling, YarnScaling | LinearScaling):
        return max(stated, int((scaling.original_positions or stated) * scaling.factor))
    return stated


def _windows(config: Mapping[str, Any], architecture: str) -> tuple[int, ...]:
    layers: int = config["num_hidden_layers"]
    everything = _for_each_layer(0, layers)
    if architecture == "LlamaForCausalLM":
        return everything
    window: int = config.get("sliding_window", 4096) or 0
    if architecture == "MistralForCausalLM":
        return _for_each_layer(window, layers)
    if not config.get("use_sliding_window", False):
        return everything
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise LoadError(f"config.json: layer_types {sorted(unknown)} are not supported")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _for_each_layer(window: int, layers: int) -> tuple[int, ...]:
    if layers > MOST_LAYERS:
        raise ValueError(f"{layers} layers")
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
}

MODEL_TYPES: Mapping[str, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

GGUF_ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")
GGUF_DTYPES = {0: "float32", 32: "bfloat16"}  # general.file_type; the others hold float16 scales


def spec_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    rope_divisors: tuple[float, ...] | None = None,
) -> ModelSpec:
    """From a GGUF file's metadata and, where that is silent (biases, tied head), its tensors."""
    arch = metadata.get("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise LoadError(f"general.architecture {arch!r} is not supported ({known} are)")
    if metadata.get(f"{arch}.expert_count", 0):
        raise LoadError(f"{arch}.expert_count: mixtures of experts are not supported")
    try:
        spec = _from_gguf(arch, metadata, tensors, rope_divisors)
    except KeyError as error:
        raise LoadError(f"GGUF metadata lacks {error}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise LoadError(f"GGUF metadata has a value that makes no sense ({error})") from None
    return _checked(spec, "GGUF metadata")


def _from_gguf(
    arch: str,
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    rope_divisors: tuple[float, ...] | None,
) -> ModelSpec:
    hidden = metadata[f"{arch}.embedding_length"]
    heads = _for_all_layers(metadata, f"{arch}.attention.head_count")
    head_dim = metadata.get(f"{arch}.attention.key_length", hidden // heads)
    layers, gpt2 = metadata[f"{arch}.block_count"], arch == "gpt2"
    rope = None if gpt2 else rope_from_gguf(metadata, arch, head_dim, rope_divisors)
    norm_key = "layer_norm_epsilon" if gpt2 else "layer_norm_rms_epsilon"
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return ModelSpec(
        architecture=MODEL_TYPES[arch],
        vocab_size=_gguf_vocab_size(arch, metadata),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_for_all_layers(metadata, f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=_for_all_layers(metadata, f"{arch}.feed_forward_length"),
        max_positions=_max_positions(metadata[f"{arch}.context_length"], rope),
        norm="layer" if gpt2 else "rms",
        norm_eps=metadata[f"{arch}.attention.{norm_key}"],
        activation="gelu_tanh" if gpt2 else "silu_gated",
        rope=rope,
        learned_positions=gpt2,
        qkv_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        windows=_for_each_layer(
            _for_all_layers(metadata, f"{arch}.attention.sliding_window", 0), layers
        ),
        tie_embeddings="output.weight" not in tensors,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        dtype=GGUF_DTYPES.get(metadata.get("general.file_type", 1), "float16"),
    )


def _for_all_layers(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A number that may be stated once or for each layer."""
    value = metadata[key] if default is None else metadata.get(key, default)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise LoadError(f"{key}: layers of different shape are not supported")
    return int(values.pop())


def _gguf_vocab_size(arch: str, metadata: Mapping[str, Any]) -> int:
    """The tokens there are; what is stated may be another number, and llama.cpp does not look."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if tokens else int(metadata[f"{arch}.vocab_size"])


MOST_LAYERS = 2**12
MOST_POSITIONS = 2**24  # more than any model has; rotary tables are made for all of them
SIZES = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "intermediate_size", "max_positions",
)  # fmt: skip
TYPES: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias", "tie_embeddings"), bool),
    "norm_eps": (float, int),
    "dtype": str,
}


def _checked(spec: ModelSpec, where: str) -> ModelSpec:
    for name in SIZES:
        if type(size := getattr(spec, name)) is not int or size < 1:
            raise LoadError(f"{where}: {name} {size!r} makes no sense")
    for name, kind in TYPES.items():
        if not isinstance(value := getattr(spec, name), kind):
            raise LoadError(f"{where}: {name} {value!r} makes no sense")
    if spec.rope is not None and spec.head_dim % 2:
        raise LoadError(f"{where}: heads of {spec.head_dim} cannot be rotated in pairs")
    if not 0 < spec.max_positions <= MOST_POSITIONS:
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
