"""A tiny gpt-oss of random weights with real MXFP4 blocks, in both layouts of its checkpoints.

Small, yet with all that tells a right implementation from a nearly right one: sizes that are
multiples of 32 but not of 128, another number of key/value heads than of queries a head, contexts
longer than the window, sinks that take a share, and gates beyond the clamp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf_files import finish, mxfp4_blocks
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedModel

LAYERS, EXPERTS, TOP_K, VOCAB, HIDDEN, WIDTH, DIM, HEADS, GROUPS = 4, 8, 4, 512, 128, 96, 32, 8, 2
WINDOW = 16
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
CONFIG: Mapping[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "head_dim": DIM,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "initial_context_length": 4096,
    "max_position_embeddings": 131072,
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "num_hidden_layers": LAYERS,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "experts_per_token": TOP_K,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
            "lm_head",
        ],
    },
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "rope_scaling": YARN,
    "sliding_window": WINDOW,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCAB,
}  # fmt: skip
ORIGINAL_CONFIG: Mapping[str, Any] = {
    "num_hidden_layers": LAYERS,
    "num_experts": EXPERTS,
    "experts_per_token": TOP_K,
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "swiglu_limit": 7.0,
    "head_dim": DIM,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "sliding_window": WINDOW,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1.0,
    "rope_ntk_beta": 32.0,
}
ORIGINAL_NAMES = {
    "model.layers.{i}.": "block.{i}.",
    "input_layernorm.weight": "attn.norm.scale",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "self_attn.o_proj": "attn.out",
    "self_attn.sinks": "attn.sinks",
    "mlp.router": "mlp.gate",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
    "mlp.experts.gate_up_proj_": "mlp.mlp1_weight.",
    "mlp.experts.down_proj_": "mlp.mlp2_weight.",
    "model.embed_tokens": "embedding",
    "model.norm.weight": "norm.scale",
    "lm_head": "unembedding",
}
GGUF_NAMES = {
    "model.layers.{i}.": "blk.{i}.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.sinks": "attn_sinks.weight",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_up_proj_bias": "ffn_gate_up_exps.bias",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
    "mlp.experts.gate_up_proj_blocks": "ffn_gate_up_exps.weight",
    "mlp.experts.down_proj_blocks": "ffn_down_exps.weight",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def normal(*shape: int, std: float = 0.05) -> Tensor:
    return (torch.randn(shape) * std).bfloat16()


def mxfp4(prefix: str, rows: int, columns: int) -> dict[str, Tensor]:
    shape = (EXPERTS, rows, columns // 32)
    return {
        f"{prefix}_blocks": torch.randint(0, 256, (*shape, 16), dtype=torch.uint8),
        f"{prefix}_scales": torch.randint(119, 123, shape, dtype=torch.uint8),
        f"{prefix}_bias": normal(EXPERTS, rows),
    }


def make_layer(layer: int) -> dict[str, Tensor]:
    p = f"model.layers.{layer}."
    projections = {"q_proj": HEADS * DIM, "k_proj": GROUPS * DIM, "v_proj": GROUPS * DIM}
    tensors = {
        p + "input_layernorm.weight": 1 + normal(HIDDEN, std=0.1),
        p + "post_attention_layernorm.weight": 1 + normal(HIDDEN, std=0.1),
        p + "self_attn.o_proj.weight": normal(HIDDEN, HEADS * DIM),
        p + "self_attn.o_proj.bias": normal(HIDDEN),
        p + "self_attn.sinks": normal(HEADS, std=1.0),
        p + "mlp.router.weight": normal(EXPERTS, HIDDEN, std=0.3),
        p + "mlp.router.bias": normal(EXPERTS, std=0.3),
        **mxfp4(p + "mlp.experts.gate_up_proj", 2 * WIDTH, HIDDEN),
        **mxfp4(p + "mlp.experts.down_proj", HIDDEN, WIDTH),
    }
    for name, rows in projections.items():
        spread = 0.05 if name == "v_proj" else 0.2  # positions have to matter
        tensors[f"{p}self_attn.{name}.weight"] = normal(rows, HIDDEN, std=spread)
        tensors[f"{p}self_attn.{name}.bias"] = normal(rows, std=0.5)
    return tensors


def make_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": normal(VOCAB, HIDDEN, std=1.0),
        "model.norm.weight": 1 + normal(HIDDEN, std=0.1),
        "lm_head.weight": normal(VOCAB, HIDDEN, std=0.2),
    }
    for layer in range(LAYERS):
        tensors |= make_layer(layer)
    return tensors


def to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names, and q, k and v as one."""
    renamed, rest = {}, dict(tensors)
    for layer in range(LAYERS):
        for kind in ("weight", "bias"):
            parts = [rest.pop(f"model.layers.{layer}.self_attn.{n}_proj.{kind}") for n in "qkv"]
            renamed[f"block.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    for name, tensor in rest.items():
        layer = next((word for word in name.split(".") if word.isdigit()), "")
        for theirs, ours in ORIGINAL_NAMES.items():
            name = name.replace(theirs.format(i=layer), ours.format(i=layer))
        renamed[name] = tensor
    return renamed


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_gpt_oss(folder: Path, **changes: Any) -> Path:
    """In Hugging Face's layout, with the other beside it in ``original``."""
    tensors = make_tensors()
    save(folder / "original", ORIGINAL_CONFIG, to_original(tensors))
    return save(folder, {**CONFIG, **changes}, tensors)


def save_gguf(path: Path, **options: Any) -> None:
    """The same in llama.cpp's form; ``options`` are the writer's own."""
    writer = gguf.GGUFWriter(path, "gpt-oss", **options)
    writer.add_context_length(131072)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_key_length(DIM)
    writer.add_value_length(DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(150000.0)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(32.0)
    writer.add_rope_scaling_orig_ctx_len(4096)
    writer.add_sliding_window(WINDOW)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_eos_token_id(2)
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    for name, (values, kind) in gguf_tensors(make_tensors()).items():
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=kind)
    finish(writer)


def gguf_tensors(tensors: Mapping[str, Tensor]) -> dict[str, tuple[np.ndarray, Any]]:
    """llama.cpp's names; gates and ups apart, experts in its own blocks, the rest in float32."""
    found: dict[str, tuple[np.ndarray, Any]] = {}
    for name, tensor in tensors.items():
        if name.endswith("_scales"):  # go with their blocks
            continue
        for theirs, part in gguf_parts(name, tensor):
            if name.endswith("_blocks"):
                scales = dict(gguf_parts(name, tensors[name.removesuffix("blocks") + "scales"]))
                raw = mxfp4_blocks(part.numpy(), scales[theirs].numpy())
                found[theirs] = raw, gguf.GGMLQuantizationType.MXFP4
            else:
                found[theirs] = part.float().numpy(), None
    return found


def gguf_parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    layer = next((word for word in name.split(".") if word.isdigit()), "")
    for theirs, ours in GGUF_NAMES.items():
        name = name.replace(theirs.format(i=layer), ours.format(i=layer))
    if "gate_up" not in name:
        return [(name, tensor)]
    return [(name.replace("gate_up", n), tensor[:, at::2]) for at, n in enumerate(("gate", "up"))]


def make_reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' model of it, its experts dequantized: exactly, but older versions leave them in
    bfloat16 and then compute in it."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=dtype,
        attn_implementation="eager",
    )
    return model.to(dtype).eval()
