"""The decoder that all models here are: embeddings, layers that add to a stream, a norm, a head.

What a model's file adds to this is its layers, by what comes after attention, and its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ruvon.kernels.ops import ForwardBatch, Ops, Packed
from ruvon.models.layers import Attention, LayerNorm, Linear, RMSNorm, norm_linear
from ruvon.models.spec import ModelSpec


class Layer(Protocol):
    """One layer: a norm, the product for queries, keys and values, attention, and the rest."""

    @property
    def attn_norm(self) -> RMSNorm | LayerNorm: ...

    @property
    def qkv(self) -> Linear: ...

    @property
    def attention(self) -> Attention: ...

    def finish(self, x_TE: Tensor, residual_TC: Tensor) -> tuple[Tensor, Tensor]:
        """Of attention's heads [T, H * D] and the stream → (what is to be added, the stream)."""


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """Token ids in, logits out; the past is in the cache."""

    spec: ModelSpec
    ops: Ops
    embed: Packed
    layers: Sequence[Layer]
    norm: RMSNorm | LayerNorm
    head: Packed
    positions: Packed | None = None  # a table of learned ones

    def forward(self, batch: ForwardBatch, cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """→ float32 logits [L, V]. ``cache``: a layer's (keys, values), [B, G, P, D] each."""
        return self.logits(self.hidden(batch, cache))

    def logits(self, x_LC: Tensor) -> Tensor:
        """→ float32 [L, V], of final hidden states."""
        return self.ops.logits(x_LC, self.head)

    def hidden(self, batch: ForwardBatch, cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """→ the final hidden states of the batch's ``logit_rows``, [L, C]."""
        x_TC: Tensor = self.ops.embed(batch.token_ids, self.embed)
        residual_TC: Tensor | None = None
        if self.positions is not None:
            residual_TC = self.ops.embed(batch.positions, self.positions)
        for layer, (k_cache, v_cache) in zip(self.layers, cache, strict=True):
            qkv_TE, residual_TC = norm_linear(layer.attn_norm, layer.qkv, x_TC, residual_TC)
            x_TC = layer.attention(qkv_TE, batch, k_cache, v_cache)
            if layer is self.layers[-1]:  # all keys are stored: on with the rows that are wanted
                x_TC = self.ops.gather_rows(x_TC, batch.logit_rows)
                residual_TC = self.ops.gather_rows(residual_TC, batch.logit_rows)
            x_TC, residual_TC = layer.finish(x_TC, residual_TC)
        x_LC, _ = self.norm(x_TC, residual_TC)
        return x_LC
