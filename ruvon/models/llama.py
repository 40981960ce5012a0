"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3, told apart by their spec.

A pre-norm decoder with RMS norms, rotary positions, grouped key/value heads and a gated MLP:

    x = x + Attention(norm(x))
    x = x + W_down (silu(W_gate norm(x)) * W_up norm(x))

Sums with the residual stream happen inside the following norm, where they cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ruvon.kernels.ops import Ops, Rope
from ruvon.models.decoder import Decoder
from ruvon.models.layers import (
    Attention,
    Linear,
    RMSNorm,
    attention_spec,
    load_linear,
    load_rms_norm,
    load_tables,
    norm_linear,
)
from ruvon.models.rope import make_rope
from ruvon.models.spec import ModelSpec
from ruvon.models.weights import Rule, Weights

RULES: Mapping[str, Rule] = {
    "embed": Rule(("model.embed_tokens",), ("token_embd",), rows="vocabulary"),
    "attn_norm": Rule(("model.layers.{i}.input_layernorm",), ("blk.{i}.attn_norm",)),
    "qkv": Rule(
        (
            "model.layers.{i}.self_attn.q_proj",
            "model.layers.{i}.self_attn.k_proj",
            "model.layers.{i}.self_attn.v_proj",
        ),
        ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v"),
        rows="heads",
    ),
    "q_norm": Rule(("model.layers.{i}.self_attn.q_norm",), ("blk.{i}.attn_q_norm",)),
    "k_norm": Rule(("model.layers.{i}.self_attn.k_norm",), ("blk.{i}.attn_k_norm",)),
    "attn_out": Rule(
        ("model.layers.{i}.self_attn.o_proj",), ("blk.{i}.attn_output",), columns="heads"
    ),
    "mlp_norm": Rule(("model.layers.{i}.post_attention_layernorm",), ("blk.{i}.ffn_norm",)),
    "gate_up": Rule(
        ("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
        ("blk.{i}.ffn_gate", "blk.{i}.ffn_up"),
        rows="width",
    ),
    "down": Rule(("model.layers.{i}.mlp.down_proj",), ("blk.{i}.ffn_down",), columns="width"),
    "norm": Rule(("model.norm",), ("output_norm",)),
    "head": Rule(("lm_head",), ("output",), rows="vocabulary"),
}
IGNORED = (".rotary_emb.inv_freq", "rope_freqs.weight")  # tables, already in the spec


@dataclass(frozen=True, slots=True)
class Layer:
    attn_norm: RMSNorm
    qkv: Linear
    attention: Attention
    attn_out: Linear
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear

    def finish(self, x_TE: Tensor, residual_TC: Tensor) -> tuple[Tensor, Tensor]:
        x_TC = self.attn_out(x_TE)
        x_TC, residual_TC = norm_linear(self.mlp_norm, self.gate_up, x_TC, residual_TC)
        return self.down(x_TC), residual_TC


def build(spec: ModelSpec, weights: Weights, ops: Ops) -> Decoder:
    """Reads the weights and makes the rotary tables."""
    rope = None if spec.rope is None else make_rope(spec.rope, spec.max_positions, ops.device)
    embed, head = load_tables(weights, spec)
    layers = weights.layers(lambda i: _layer(spec, weights, rope, i))
    norm = load_rms_norm(weights, "norm", spec.hidden_size, spec.norm_eps)
    return Decoder(weights.share, ops, embed, layers, norm, head)


def _layer(spec: ModelSpec, weights: Weights, rope: Rope | None, i: int) -> Layer:
    hidden, wide, eps = spec.hidden_size, spec.intermediate_size, spec.norm_eps
    heads, groups = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    rows = (heads, groups, groups)
    return Layer(
        attn_norm=load_rms_norm(weights, "attn_norm", hidden, eps, i),
        qkv=load_linear(weights, "qkv", rows, hidden, i, bias=spec.qkv_bias),
        attention=load_attention(spec, weights, rope, i),
        attn_out=load_linear(weights, "attn_out", (hidden,), heads, i, bias=spec.output_bias),
        mlp_norm=load_rms_norm(weights, "mlp_norm", hidden, eps, i),
        gate_up=load_linear(
            weights, "gate_up", (wide, wide), hidden, i, bias=spec.mlp_bias, activation="silu_gated"
        ),
        down=load_linear(weights, "down", (hidden,), wide, i, bias=spec.mlp_bias),
    )


def load_attention(spec: ModelSpec, weights: Weights, rope: Rope | None, i: int) -> Attention:
    """A layer's attention, without sinks."""
    normed = spec.qk_norm
    return Attention(
        ops=weights.ops,
        spec=attention_spec(weights.share.local, i),
        rope=rope,
        q_norm_D=weights.norm("q_norm", spec.head_dim, i) if normed else None,
        k_norm_D=weights.norm("k_norm", spec.head_dim, i) if normed else None,
        eps=spec.norm_eps,
    )
