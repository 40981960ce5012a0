"""Writes GGUF files with the `gguf` package, from transformers' models and from raw blocks."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from transformers import PreTrainedModel

NAMES = {
    "gpt2": {
        "transformer.wte": "token_embd",
        "transformer.wpe": "position_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
        "transformer.h.{i}.ln_1": "blk.{i}.attn_norm",
        "transformer.h.{i}.attn.c_attn": "blk.{i}.attn_qkv",
        "transformer.h.{i}.attn.c_proj": "blk.{i}.attn_output",
        "transformer.h.{i}.ln_2": "blk.{i}.ffn_norm",
        "transformer.h.{i}.mlp.c_fc": "blk.{i}.ffn_up",
        "transformer.h.{i}.mlp.c_proj": "blk.{i}.ffn_down",
    },
    "llama": {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers.{i}.input_layernorm": "blk.{i}.attn_norm",
        "model.layers.{i}.self_attn.q_proj": "blk.{i}.attn_q",
        "model.layers.{i}.self_attn.k_proj": "blk.{i}.attn_k",
        "model.layers.{i}.self_attn.v_proj": "blk.{i}.attn_v",
        "model.layers.{i}.self_attn.o_proj": "blk.{i}.attn_output",
        "model.layers.{i}.self_attn.q_norm": "blk.{i}.attn_q_norm",
        "model.layers.{i}.self_attn.k_norm": "blk.{i}.attn_k_norm",
        "model.layers.{i}.post_attention_layernorm": "blk.{i}.ffn_norm",
        "model.layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
        "model.layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
        "model.layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
        "model.layers.{i}.mlp.gate": "blk.{i}.ffn_gate_inp",
        "model.layers.{i}.mlp.experts.gate_proj": "blk.{i}.ffn_gate_exps",
        "model.layers.{i}.mlp.experts.up_proj": "blk.{i}.ffn_up_exps",
        "model.layers.{i}.mlp.experts.down_proj": "blk.{i}.ffn_down_exps",
    },
}
NAMES["gemma3"] = NAMES["llama"] | {
    "model.layers.{i}.post_attention_layernorm": "blk.{i}.post_attention_norm",
    "model.layers.{i}.pre_feedforward_layernorm": "blk.{i}.ffn_norm",
    "model.layers.{i}.post_feedforward_layernorm": "blk.{i}.post_ffw_norm",
}


def gguf_name(name: str, arch: str) -> str:
    stem, kind = name.rsplit(".", 1)
    words = stem.split(".")
    layer = next((word for word in words if word.isdigit()), "")
    pattern = ".".join("{i}" if word.isdigit() else word for word in words)
    table = NAMES.get(arch, NAMES["llama"])
    return f"{table[pattern].format(i=layer)}.{kind}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order of llama.cpp's converter for the architecture ``llama``."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    arch: str,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    metadata: dict[str, object] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """The model in llama.cpp's form; matrices quantized to ``kind``. The model's own weights are
    replaced by what the file holds, so that it stays the reference."""
    writer = gguf.GGUFWriter(path, arch)
    add_description(writer, model, arch, metadata or {})
    state = {k: v for name, x in model.state_dict().items() for k, v in parts_of(name, x)}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    for name, tensor in state.items():
        add_weight(writer, model, arch, name, tensor, kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    finish(writer)


def parts_of(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """transformers keeps experts' gates and ups in one tensor; llama.cpp does not."""
    if name.endswith("experts.gate_up_proj"):
        stem = name.removesuffix("gate_up_proj")
        return [(f"{stem}{n}_proj.weight", part) for n, part in
                zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True)]  # fmt: skip
    return [(f"{name}.weight" if name.endswith("experts.down_proj") else name, tensor)]


def add_weight(writer, model, arch, name, tensor, kind) -> None:
    values = tensor.numpy()
    turned = arch == "gpt2" and ".c_" in name and values.ndim == 2  # Conv1D keeps it K×N
    if turned:
        values = values.T
    raw_dtype = None
    matrix = values.ndim > 1 and not name.endswith("mlp.gate.weight")
    if matrix and kind != GGMLQuantizationType.F32:
        packed = quants.quantize(np.ascontiguousarray(values), kind)
        plain = torch.from_numpy(quants.dequantize(packed, kind).copy())
        tensor.copy_(plain.T if turned else plain)
        values, raw_dtype = plain.numpy(), kind
    if arch == "gemma3" and values.ndim == 1:  # a norm: by what it exceeds 1 in transformers
        values = 1 + values
    if arch == "llama" and ".q_proj" in name:
        values = interleave(values, model.config.num_attention_heads)
    if arch == "llama" and ".k_proj" in name:
        values = interleave(values, model.config.num_key_value_heads)
    values = np.ascontiguousarray(values)
    if raw_dtype is not None:
        values = quants.quantize(values, kind)
    writer.add_tensor(gguf_name(name, arch), values, raw_dtype=raw_dtype)


def add_description(writer, model, arch, metadata) -> None:
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(0)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    if arch == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        rope = config.rope_parameters
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
        head_dim = getattr(config, "head_dim", None)
        writer.add_key_length(head_dim or config.hidden_size // config.num_attention_heads)
    if arch == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        (writer.add_float32 if isinstance(value, float) else add)(key, value)


def write_tensors(path: Path, tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]]) -> None:
    """A file that is no model: tensors as raw bytes (or arrays) of their types."""
    writer = gguf.GGUFWriter(path, "qwen2")
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mxfp4_blocks(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Hugging Face's blocks [..., K / 32, 16] and scales [..., K / 32] in llama.cpp's order."""
    wide = np.stack((codes & 15, codes >> 4), axis=-1).reshape(*codes.shape[:-1], 32)
    packed = wide[..., :16] | (wide[..., 16:] << 4)
    raw = np.concatenate((scales[..., None], packed), axis=-1)
    return raw.reshape(*codes.shape[:-2], -1)


def random_blocks(kind: GGMLQuantizationType, rows: int, blocks: int) -> np.ndarray:
    """uint8 [rows, bytes]: any bits at all, but for scales that are finite numbers."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in SCALES_AT[kind.name]:
        halves = rng.uniform(-0.1, 0.1, (rows, blocks, 1)).astype(np.float16)
        raw[..., at : at + 2] = halves.view(np.uint8)
    return raw.reshape(rows, -1)


SCALES_AT = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
