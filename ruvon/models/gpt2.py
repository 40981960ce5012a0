"""GPT-2, 124M to XL: a pre-norm decoder with layer norms, learned positions and a plain MLP.

    x = embed(token) + positions(place)
    x = x + Attention(norm(x))
    x = x + W_down gelu(W_up norm(x))

Sums with the residual stream happen inside the following norm, where they cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ruvon.kernels.ops import Ops
from ruvon.models.decoder import Decoder
from ruvon.models.layers import (
    Attention,
    LayerNorm,
    Linear,
    attention_spec,
    load_layer_norm,
    load_linear,
    load_tables,
    norm_linear,
)
from ruvon.models.spec import ModelSpec
from ruvon.models.weights import Rule, Weights

RULES: Mapping[str, Rule] = {
    "embed": Rule(("transformer.wte",), ("token_embd",), rows="vocabulary"),
    "positions": Rule(("transformer.wpe",), ("position_embd",)),
    "attn_norm": Rule(("transformer.h.{i}.ln_1",), ("blk.{i}.attn_norm",)),
    "qkv": Rule(
        ("transformer.h.{i}.attn.c_attn",), ("blk.{i}.attn_qkv",), transposed=True, rows="heads"
    ),
    "attn_out": Rule(
        ("transformer.h.{i}.attn.c_proj",),
        ("blk.{i}.attn_output",),
        transposed=True,
        columns="heads",
    ),
    "mlp_norm": Rule(("transformer.h.{i}.ln_2",), ("blk.{i}.ffn_norm",)),
    "up": Rule(("transformer.h.{i}.mlp.c_fc",), ("blk.{i}.ffn_up",), transposed=True, rows="width"),
    "down": Rule(
        ("transformer.h.{i}.mlp.c_proj",), ("blk.{i}.ffn_down",), transposed=True, columns="width"
    ),
    "norm": Rule(("transformer.ln_f",), ("output_norm",)),
    "head": Rule(("lm_head",), ("output",), rows="vocabulary"),
}
IGNORED = (".attn.bias", ".attn.masked_bias")  # causal masks of old checkpoints


@dataclass(frozen=True, slots=True)
class Layer:
    attn_norm: LayerNorm
    qkv: Linear
    attention: Attention
    attn_out: Linear
    mlp_norm: LayerNorm
    up: Linear
    down: Linear

    def finish(self, x_TE: Tensor, residual_TC: Tensor) -> tuple[Tensor, Tensor]:
        x_TC = self.attn_out(x_TE)
        x_TC, residual_TC = norm_linear(self.mlp_norm, self.up, x_TC, residual_TC)
        return self.down(x_TC), residual_TC


def build(spec: ModelSpec, weights: Weights, ops: Ops) -> Decoder:
    """Reads the weights."""
    embed, head = load_tables(weights, spec)
    shape = (spec.max_positions, spec.hidden_size)
    first = weights.share.mesh.is_first
    places = weights.table("positions", *shape, quantize=False) if first else None
    layers = weights.layers(lambda i: _layer(spec, weights, i))
    norm = load_layer_norm(weights, "norm", spec.hidden_size, spec.norm_eps)
    return Decoder(weights.share, ops, embed, layers, norm, head, places)


def _layer(spec: ModelSpec, weights: Weights, i: int) -> Layer:
    hidden, wide, eps = spec.hidden_size, spec.intermediate_size, spec.norm_eps
    return Layer(
        attn_norm=load_layer_norm(weights, "attn_norm", hidden, eps, i),
        qkv=load_linear(weights, "qkv", (hidden,) * 3, hidden, i, bias=spec.qkv_bias),
        attention=Attention(weights.ops, attention_spec(weights.share.local, i)),
        attn_out=load_linear(weights, "attn_out", (hidden,), hidden, i, bias=spec.output_bias),
        mlp_norm=load_layer_norm(weights, "mlp_norm", hidden, eps, i),
        up=load_linear(
            weights, "up", (wide,), hidden, i, bias=spec.mlp_bias, activation=spec.activation
        ),
        down=load_linear(weights, "down", (hidden,), wide, i, bias=spec.mlp_bias),
    )
