"""Gemma 3's text models.

A decoder with norms on both sides of attention and of a gated MLP, each layer with the rotation of
its kind: layers with a window turn fast, those that see everything slowly.

    x = sqrt(C) * embed(token)
    x = x + norm(Attention(norm(x)))
    x = x + norm(W_down (gelu(W_gate norm(x)) * W_up norm(x)))

Here the stream is ``x / sqrt(C)``: the table needs no scaling then, nor a copy beside the head that
it is tied to. A norm before attention or the MLP gives the same for that, with an epsilon divided
by C, and what the norms behind them add is divided by sqrt(C) in their weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ruvon.kernels.mesh import ALONE
from ruvon.kernels.ops import Ops, Rope
from ruvon.models import llama
from ruvon.models.decoder import Decoder
from ruvon.models.layers import (
    Attention,
    Linear,
    RMSNorm,
    attention_spec,
    load_linear,
    load_tables,
    norm_linear,
)
from ruvon.models.rope import make_rope
from ruvon.models.spec import ModelSpec
from ruvon.models.weights import Rule, Weights

RULES: Mapping[str, Rule] = {
    **llama.RULES,
    "attn_post_norm": Rule(
        ("model.layers.{i}.post_attention_layernorm",), ("blk.{i}.post_attention_norm",)
    ),
    "mlp_norm": Rule(("model.layers.{i}.pre_feedforward_layernorm",), ("blk.{i}.ffn_norm",)),
    "mlp_post_norm": Rule(
        ("model.layers.{i}.post_feedforward_layernorm",), ("blk.{i}.post_ffw_norm",)
    ),
}
IGNORED = llama.IGNORED


@dataclass(frozen=True, slots=True)
class Layer:
    attn_norm: RMSNorm
    qkv: Linear
    attention: Attention
    attn_out: Linear
    attn_post_norm: RMSNorm
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear
    mlp_post_norm: RMSNorm

    def finish(self, x_TE: Tensor, residual_TC: Tensor) -> tuple[Tensor, Tensor]:
        x_TC, _ = self.attn_post_norm(self.attn_out(x_TE), None)
        x_TC, residual_TC = norm_linear(self.mlp_norm, self.gate_up, x_TC, residual_TC)
        x_TC, _ = self.mlp_post_norm(self.down(x_TC), None)
        return x_TC, residual_TC


def build(spec: ModelSpec, weights: Weights, ops: Ops) -> Decoder:
    """Reads the weights and makes the rotary tables."""
    assert spec.rope is not None
    assert spec.local_rope is not None
    far, near = (
        make_rope(rope, spec.max_positions, ops.device) for rope in (spec.rope, spec.local_rope)
    )
    embed, head = load_tables(weights, spec)
    norms = Norms(spec, weights)
    layers = weights.layers(
        lambda i: _layer(spec, weights, norms, near if spec.windows[i] else far, i)
    )
    return Decoder(weights.share, ops, embed, layers, norms.before("norm"), head)


@dataclass(frozen=True, slots=True)
class Norms:
    """Loads norms. A checkpoint holds what their weights exceed 1 by, GGUF the weights."""

    spec: ModelSpec
    weights: Weights

    def weight(self, key: str, size: int, layer: int) -> Tensor:
        stored = self.weights.norm(key, size, layer)
        return stored if self.weights.is_gguf else 1 + stored

    def before(self, key: str, layer: int = 0) -> RMSNorm:
        """A norm of the stream, all of whose summands are whole but the embedding."""
        size = self.spec.hidden_size
        eps = self.spec.norm_eps / self._stream_scale() ** 2
        mesh = self.weights.share.mesh if key == "attn_norm" and layer == 0 else ALONE
        return RMSNorm(self.weights.ops, self.weight(key, size, layer), eps, mesh)

    def behind(self, key: str, layer: int) -> RMSNorm:
        """A norm of what is added to the stream."""
        weight_C = self.weight(key, self.spec.hidden_size, layer) / self._stream_scale()
        return RMSNorm(self.weights.ops, weight_C, self.spec.norm_eps, self.weights.share.mesh)

    def _stream_scale(self) -> float:
        """sqrt(C), rounded as by whoever multiplies in the compute dtype."""
        return torch.tensor(self.spec.hidden_size**0.5).to(self.weights.ops.dtype).item()


def _layer(spec: ModelSpec, weights: Weights, norms: Norms, rope: Rope, i: int) -> Layer:
    hidden, wide = spec.hidden_size, spec.intermediate_size
    heads, groups = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    rows = (heads, groups, groups)
    return Layer(
        attn_norm=norms.before("attn_norm", i),
        qkv=load_linear(weights, "qkv", rows, hidden, i, bias=spec.qkv_bias),
        attention=Attention(
            ops=weights.ops,
            spec=attention_spec(weights.share.local, i),
            rope=rope,
            q_norm_D=norms.weight("q_norm", spec.head_dim, i),
            k_norm_D=norms.weight("k_norm", spec.head_dim, i),
            eps=spec.norm_eps,
        ),
        attn_out=load_linear(weights, "attn_out", (hidden,), heads, i, bias=spec.output_bias),
        attn_post_norm=norms.behind("attn_post_norm", i),
        mlp_norm=norms.before("mlp_norm", i),
        gate_up=load_linear(
            weights, "gate_up", (wide, wide), hidden, i, bias=False, activation=spec.activation
        ),
        down=load_linear(weights, "down", (hidden,), wide, i, bias=False),
        mlp_post_norm=norms.behind("mlp_post_norm", i),
    )
