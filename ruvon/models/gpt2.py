"""GPT-2, 124M to XL: a pre-norm decoder with layer norms, learned positions and a plain MLP.

    x = embed(token) + positions(place)
    x = x + Attention(norm(x))
    x = x + W_down gelu(W_up norm(x))

Sums with the residual stream happen inside the following norm, where they cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ruvon.kernels.ops import ForwardBatch, Ops, Packed
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
    "embed": Rule(("transformer.wte",), ("token_embd",)),
    "positions": Rule(("transformer.wpe",), ("position_embd",)),
    "attn_norm": Rule(("transformer.h.{i}.ln_1",), ("blk.{i}.attn_norm",)),
    "qkv": Rule(("transformer.h.{i}.attn.c_attn",), ("blk.{i}.attn_qkv",), transposed=True),
    "attn_out": Rule(("transformer.h.{i}.attn.c_proj",), ("blk.{i}.attn_output",), transposed=True),
    "mlp_norm": Rule(("transformer.h.{i}.ln_2",), ("blk.{i}.ffn_norm",)),
    "up": Rule(("transformer.h.{i}.mlp.c_fc",), ("blk.{i}.ffn_up",), transposed=True),
    "down": Rule(("transformer.h.{i}.mlp.c_proj",), ("blk.{i}.ffn_down",), transposed=True),
    "norm": Rule(("transformer.ln_f",), ("output_norm",)),
    "head": Rule(("lm_head",), ("output",)),
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


@dataclass(frozen=True, slots=True, eq=False)
class GPT2:
    """Token ids in, logits out; the past is in the cache."""

    spec: ModelSpec
    ops: Ops
    embed: Packed
    positions: Packed
    layers: tuple[Layer, ...]
    norm: LayerNorm
    head: Packed

    def forward(self, batch: ForwardBatch, cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """→ float32 logits [L, V]. ``cache``: a layer's (keys, values), [B, G, P, D] each."""
        return self.logits(self.hidden(batch, cache))

    def logits(self, x_LC: Tensor) -> Tensor:
        """→ float32 [L, V], of final hidden states."""
        return self.ops.logits(x_LC, self.head)

    def hidden(self, batch: ForwardBatch, cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """→ the final hidden states of the batch's ``logit_rows``, [L, C]."""
        x_TC: Tensor = self.ops.embed(batch.token_ids, self.embed)
        residual_TC: Tensor | None = self.ops.embed(batch.positions, self.positions)
        for layer, (k_cache, v_cache) in zip(self.layers, cache, strict=True):
            qkv_TE, residual_TC = norm_linear(layer.attn_norm, layer.qkv, x_TC, residual_TC)
            x_TC = layer.attention(qkv_TE, batch, k_cache, v_cache)
            if layer is self.layers[-1]:  # all keys are stored: on with the rows that are wanted
                x_TC = self.ops.gather_rows(x_TC, batch.logit_rows)
                residual_TC = self.ops.gather_rows(residual_TC, batch.logit_rows)
            x_TC = layer.attn_out(x_TC)
            x_TC, residual_TC = norm_linear(layer.mlp_norm, layer.up, x_TC, residual_TC)
            x_TC = layer.down(x_TC)
        x_LC, _ = self.norm(x_TC, residual_TC)
        return x_LC


def build(spec: ModelSpec, weights: Weights, ops: Ops) -> GPT2:
    """Reads the weights."""
    embed, head = load_tables(weights, spec)
    places = weights.table("positions", spec.max_positions, spec.hidden_size, quantize=False)
    layers = weights.layers(lambda i: _layer(spec, weights, i))
    norm = load_layer_norm(weights, "norm", spec.hidden_size, spec.norm_eps)
    return GPT2(spec, ops, embed, places, layers, norm, head)


def _layer(spec: ModelSpec, weights: Weights, i: int) -> Layer:
    hidden, wide, eps = spec.hidden_size, spec.intermediate_size, spec.norm_eps
    return Layer(
        attn_norm=load_layer_norm(weights, "attn_norm", hidden, eps, i),
        qkv=load_linear(weights, "qkv", (hidden,) * 3, hidden, i, bias=spec.qkv_bias),
        attention=Attention(weights.ops, attention_spec(spec, i)),
        attn_out=load_linear(weights, "attn_out", (hidden,), hidden, i, bias=spec.output_bias),
        mlp_norm=load_layer_norm(weights, "mlp_norm", hidden, eps, i),
        up=load_linear(
            weights, "up", (wide,), hidden, i, bias=spec.mlp_bias, activation=spec.activation
        ),
        down=load_linear(weights, "down", (hidden,), wide, i, bias=spec.mlp_bias),
    )
