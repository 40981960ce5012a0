"""Mixtures of experts: gpt-oss and Qwen3-MoE, told apart by their spec.

A decoder like Llama, but that each token goes through a few of many MLPs, which a router chooses:

    x = x + Attention(norm(x))
    x = x + sum over the experts e chosen for x of weight_e * MLP_e(norm(x))

gpt-oss's queries may also look away: a learned logit a head joins each softmax and takes no value.
Sums with the residual stream happen inside the following norm, where they cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ruvon.kernels.ops import Ops, Rope
from ruvon.models import llama
from ruvon.models.decoder import Decoder
from ruvon.models.experts import load_experts
from ruvon.models.layers import (
    Attention,
    Linear,
    Mixture,
    RMSNorm,
    load_linear,
    load_rms_norm,
    load_tables,
    norm_mixture,
)
from ruvon.models.rope import make_rope
from ruvon.models.spec import ModelSpec
from ruvon.models.weights import Rule, Weights

ENDINGS = {"weight": "", "bias": "_bias", "blocks": "_blocks", "scales": "_scales"}
GGUF_UP, GGUF_DOWN = ("blk.{i}.ffn_gate_exps", "blk.{i}.ffn_up_exps"), ("blk.{i}.ffn_down_exps",)
EXPERTS = "model.layers.{i}.mlp.experts."

QWEN3_MOE_RULES: Mapping[str, Rule] = {
    **{key: rule for key, rule in llama.RULES.items() if key not in ("gate_up", "down")},
    "router": Rule(("model.layers.{i}.mlp.gate",), ("blk.{i}.ffn_gate_inp",)),
    "experts_up": Rule(
        (EXPERTS + "gate_up_proj",),
        GGUF_UP,
        endings=ENDINGS,
        each=(EXPERTS + "{e}.gate_proj", EXPERTS + "{e}.up_proj"),
        rows="width",
    ),
    "experts_down": Rule(
        (EXPERTS + "down_proj",),
        GGUF_DOWN,
        endings=ENDINGS,
        each=(EXPERTS + "{e}.down_proj",),
        columns="width",
    ),
}

RULES: Mapping[str, Rule] = {
    **QWEN3_MOE_RULES,
    "mlp_norm": Rule(
        ("model.layers.{i}.post_attention_layernorm",), ("blk.{i}.post_attention_norm",)
    ),
    "sinks": Rule(
        ("model.layers.{i}.self_attn.sinks",),
        ("blk.{i}.attn_sinks",),
        endings={"weight": ""},
        rows="heads",
    ),
    "router": Rule(("model.layers.{i}.mlp.router",), ("blk.{i}.ffn_gate_inp",)),
    "experts_up": Rule(
        (EXPERTS + "gate_up_proj",),
        GGUF_UP,
        transposed=True,
        endings=ENDINGS,
        interleaved=True,
        rows="width",
    ),
    "experts_down": Rule(
        (EXPERTS + "down_proj",), GGUF_DOWN, transposed=True, endings=ENDINGS, columns="width"
    ),
}

SCALE = {"weight": ".scale"}
PARTS = {"bias": "_bias", "blocks": "_weight.blocks", "scales": "_weight.scales"}

ORIGINAL_RULES: Mapping[str, Rule] = {
    "embed": Rule(("embedding",), (), rows="vocabulary"),
    "attn_norm": Rule(("block.{i}.attn.norm",), (), endings=SCALE),
    "qkv": Rule(("block.{i}.attn.qkv",), (), rows="heads"),
    "sinks": Rule(("block.{i}.attn.sinks",), (), endings={"weight": ""}, rows="heads"),
    "attn_out": Rule(("block.{i}.attn.out",), (), columns="heads"),
    "mlp_norm": Rule(("block.{i}.mlp.norm",), (), endings=SCALE),
    "router": Rule(("block.{i}.mlp.gate",), ()),
    "experts_up": Rule(("block.{i}.mlp.mlp1",), (), endings=PARTS, interleaved=True, rows="width"),
    "experts_down": Rule(("block.{i}.mlp.mlp2",), (), endings=PARTS, columns="width"),
    "norm": Rule(("norm",), (), endings=SCALE),
    "head": Rule(("unembedding",), (), rows="vocabulary"),
}
"""OpenAI's own layout."""

IGNORED = llama.IGNORED


@dataclass(frozen=True, slots=True)
class Layer:
    attn_norm: RMSNorm
    qkv: Linear
    attention: Attention
    attn_out: Linear
    mlp_norm: RMSNorm
    mixture: Mixture

    def finish(self, x_TE: Tensor, residual_TC: Tensor) -> tuple[Tensor, Tensor]:
        return norm_mixture(self.mlp_norm, self.mixture, self.attn_out(x_TE), residual_TC)


def build(spec: ModelSpec, weights: Weights, ops: Ops) -> Decoder:
    """Reads the weights and makes the rotary tables."""
    rope = None if spec.rope is None else make_rope(spec.rope, spec.max_positions, ops.device)
    embed, head = load_tables(weights, spec)
    layers = weights.layers(lambda i: _layer(spec, weights, rope, i))
    norm = load_rms_norm(weights, "norm", spec.hidden_size, spec.norm_eps)
    return Decoder(weights.share, ops, embed, layers, norm, head)


def _layer(spec: ModelSpec, weights: Weights, rope: Rope | None, i: int) -> Layer:
    hidden, eps = spec.hidden_size, spec.norm_eps
    heads, groups = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    rows = (heads, groups, groups)
    attention = llama.load_attention(spec, weights, rope, i)
    sinks = weights.norm("sinks", spec.num_heads, i) if spec.sinks else None
    return Layer(
        attn_norm=load_rms_norm(weights, "attn_norm", hidden, eps, i),
        qkv=load_linear(weights, "qkv", rows, hidden, i, bias=spec.qkv_bias),
        attention=replace(attention, sinks_H=sinks),
        attn_out=load_linear(weights, "attn_out", (hidden,), heads, i, bias=spec.output_bias),
        mlp_norm=load_rms_norm(weights, "mlp_norm", hidden, eps, i),
        mixture=_mixture(spec, weights, i),
    )


def _mixture(spec: ModelSpec, weights: Weights, i: int) -> Mixture:
    assert spec.experts is not None
    count, biased = spec.experts.num_experts, spec.mlp_bias
    return Mixture(
        ops=weights.ops,
        router=weights.matrix("router", (count,), spec.hidden_size, i, quantize=False),
        router_bias_E=weights.bias("router", (count,), i) if biased else None,
        experts=load_experts(weights, spec.experts, spec.hidden_size, i, bias=biased),
    )
