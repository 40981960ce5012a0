"""The decoder that all models here are: embeddings, layers that add to a stream, a norm, a head.

What a model's file adds to this is its layers, by what comes after attention, and its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ruvon.kernels.ops import ForwardBatch, Ops, Packed
from ruvon.models.layers import Attention, LayerNorm, Linear, RMSNorm, norm_linear
from ruvon.models.shares import Share
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
        """Of attention's heads [T, H * D] and the stream → (what is to be added, the stream). Ranks
        that share the layer make a summand each of the first, which the next norm adds up."""


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """Token ids in, logits out; the past is in the cache."""

    share: Share
    ops: Ops
    embed: Packed | None  # on the first stage
    layers: Sequence[Layer]  # of this stage
    norm: RMSNorm | LayerNorm
    head: Packed | None  # on the last stage
    positions: Packed | None = None  # a table of learned ones

    @property
    def spec(self) -> ModelSpec:
        """Of what is here: as many heads and columns; but all layers."""
        return self.share.local

    @property
    def held(self) -> range:
        """Which layers are here."""
        return self.share.layers

    def forward(self, batch: ForwardBatch, cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """→ float32 logits [L, V]. ``cache``: a layer's (keys, values), [B, G, P, D] each.
        On a stage before the last, what `hidden` returns there."""
        return self.logits(self.hidden(batch, cache))

    def logits(self, x_LC: Tensor) -> Tensor:
        """→ float32 [L, V], of final hidden states."""
        if self.head is None:
            return x_LC
        logits_LV = self.ops.logits(x_LC, self.head)
        return self.share.mesh.gather(logits_LV, self.share.vocabulary_widths)

    def hidden(self, batch: ForwardBatch, cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """→ the final hidden states of the batch's ``logit_rows``, [L, C]. On a stage before the
        last, the stream [T, C] that has been sent on."""
        mesh = self.share.mesh
        x_TC, residual_TC = self._entering(batch)
        for layer, (k_cache, v_cache) in zip(self.layers, cache, strict=True):
            qkv_TE, residual_TC = norm_linear(layer.attn_norm, layer.qkv, x_TC, residual_TC)
            x_TC = layer.attention(qkv_TE, batch, k_cache, v_cache)
            # Once all keys are stored, on with the rows that are wanted.
            if mesh.is_last and layer is self.layers[-1]:
                x_TC = self.ops.gather_rows(x_TC, batch.logit_rows)
                residual_TC = self.ops.gather_rows(residual_TC, batch.logit_rows)
            x_TC, residual_TC = layer.finish(x_TC, residual_TC)
        if not mesh.is_last:
            assert residual_TC is not None, "every stage has a layer"
            return mesh.send(self.ops.add(self.norm.mesh.reduce(x_TC), residual_TC))
        x_LC, _ = self.norm(x_TC, residual_TC)
        return x_LC

    def streams(
        self, batch: ForwardBatch, cache: Sequence[tuple[Tensor, Tensor]]
    ) -> Iterator[Tensor]:
        """The stream [T, C] as it enters the first layer, and as it leaves each: for looking
        inside. `read_out` makes logits of any."""
        x_TC, residual_TC = self._entering(batch)
        yield x_TC if residual_TC is None else self.ops.add(x_TC, residual_TC)
        for layer, (k_cache, v_cache) in zip(self.layers, cache, strict=True):
            qkv_TE, residual_TC = norm_linear(layer.attn_norm, layer.qkv, x_TC, residual_TC)
            x_TC = layer.attention(qkv_TE, batch, k_cache, v_cache)
            x_TC, residual_TC = layer.finish(x_TC, residual_TC)
            yield self.ops.add(x_TC, residual_TC)

    def read_out(self, stream_TC: Tensor) -> Tensor:
        """→ float32 logits [T, V], as if the stream had left the last layer."""
        x_TC, _ = self.norm(stream_TC, None)
        return self.logits(x_TC)

    def _entering(self, batch: ForwardBatch) -> tuple[Tensor, Tensor | None]:
        """What the first layer here is given, and the stream before that is added to it. Of an
        embedding each rank has some rows, and zeros for others: its layers' first norm sums."""
        mesh = self.share.mesh
        if self.embed is None:
            width = self.share.spec.hidden_size
            return mesh.receive(batch.token_ids, width, self.ops.dtype), None
        first = None if mesh.size == 1 else self.share.vocabulary.start
        x_TC = self.ops.embed(batch.token_ids, self.embed, first)
        if self.positions is None:
            return x_TC, None
        return x_TC, self.ops.embed(batch.positions, self.positions, None)
