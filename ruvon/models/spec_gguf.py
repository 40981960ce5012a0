"""`ModelSpec` from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ruvon.errors import LoadError
from ruvon.models import mixtures, spec_gemma3
from ruvon.models.rope import RopeSpec, YarnScaling, rope_from_gguf
from ruvon.models.spec import ModelSpec, checked, for_each_layer, max_positions

GGUF_ARCHITECTURES: Mapping[str, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": mixtures.QWEN3_MOE,
    "gpt-oss": mixtures.GPT_OSS,
    "gemma3": spec_gemma3.GEMMA3,
}
GGUF_DTYPES = {0: "float32", 32: "bfloat16"}  # general.file_type; the others hold float16 scales


def spec_from_gguf(
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    rope_divisors: tuple[float, ...] | None = None,
) -> ModelSpec:
    """From a GGUF file's metadata and, where that is silent (biases, tied head), its tensors."""
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in GGUF_ARCHITECTURES:
        known = ", ".join(GGUF_ARCHITECTURES)
        raise LoadError(f"general.architecture {arch!r} is not supported ({known} are)")
    try:
        spec = _from_gguf(arch, metadata, tensors, rope_divisors)
    except KeyError as error:
        raise LoadError(f"GGUF metadata lacks {error}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise LoadError(f"GGUF metadata has a value that makes no sense ({error})") from None
    return checked(spec, "GGUF metadata")


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
    architecture, vocab_size = GGUF_ARCHITECTURES[arch], _vocab_size(arch, metadata)
    experts = mixtures.experts_from_gguf(metadata, arch)
    rope = None if gpt2 else _rope(metadata, arch, head_dim, rope_divisors)
    norm_key = "layer_norm_epsilon" if gpt2 else "layer_norm_rms_epsilon"
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends += mixtures.ends(architecture, vocab_size)
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_for_all_layers(metadata, f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=(
            experts.width
            if experts is not None
            else _for_all_layers(metadata, f"{arch}.feed_forward_length")
        ),
        max_positions=max_positions(metadata[f"{arch}.context_length"], rope),
        norm="layer" if gpt2 else "rms",
        norm_eps=metadata[f"{arch}.attention.{norm_key}"],
        activation="gelu_tanh" if gpt2 else "silu_gated",
        rope=rope,
        learned_positions=gpt2,
        qkv_bias="blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors or "blk.0.ffn_up_exps.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        windows=_windows(metadata, arch, layers),
        tie_embeddings="output.weight" not in tensors,
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        dtype=GGUF_DTYPES.get(metadata.get("general.file_type", 1), "float16"),
        experts=experts,
        sinks="blk.0.attn_sinks.weight" in tensors,
    )
    if arch != "gemma3":
        return spec
    return replace(spec, **spec_gemma3.fields_from_gguf(metadata, hidden, heads, head_dim))


def _rope(
    metadata: Mapping[str, Any], arch: str, head_dim: int, divisors: tuple[float, ...] | None
) -> RopeSpec:
    """gpt-oss was trained with a ramp between broken dimensions, which GGUF has no word for."""
    rope = rope_from_gguf(metadata, arch, head_dim, divisors)
    if arch != "gpt-oss":
        return rope
    if not isinstance(rope.scaling, YarnScaling):
        raise LoadError(f"{arch}.rope.scaling.type is not 'yarn', which this model needs")
    return replace(rope, scaling=replace(rope.scaling, truncate=False))


def _windows(metadata: Mapping[str, Any], arch: str, layers: int) -> tuple[int, ...]:
    if arch == "gpt-oss":
        return mixtures.windows_from_gguf(metadata, arch, layers)
    window = _for_all_layers(metadata, f"{arch}.attention.sliding_window", 0)
    return for_each_layer(window, layers)


def _for_all_layers(metadata: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A number that may be stated once or for each layer."""
    value = metadata[key] if default is None else metadata.get(key, default)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise LoadError(f"{key}: layers of different shape are not supported")
    return int(values.pop())


def _vocab_size(arch: str, metadata: Mapping[str, Any]) -> int:
    """The tokens there are; what is stated may be another number, and llama.cpp does not look."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if tokens else int(metadata[f"{arch}.vocab_size"])
