"""The parts models are made of, as functions of the operations they are given.

Each is frozen data (weights and numbers) with a call. They hold no state between steps: the cache
comes in as an argument, and is written by `Attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from torch import Tensor

from ruvon.kernels.mesh import ALONE, Mesh
from ruvon.kernels.ops import (
    Activation,
    AttentionSpec,
    ForwardBatch,
    Ops,
    Packed,
    PackedExperts,
    Rope,
)
from ruvon.models.cache_groups import cache_groups, place_of
from ruvon.models.shares import Share
from ruvon.models.spec import ModelSpec
from ruvon.models.weights import Weights

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Linear:
    """act(x Wᵀ + b). Where ranks share the columns, which are ``mesh`` then, a summand of that: the
    norm behind it adds the ranks' up."""

    ops: Ops
    weight: Packed
    bias_N: Tensor | None = None
    activation: Activation = "none"
    mesh: Mesh = ALONE

    def __call__(self, x_TK: Tensor) -> Tensor:
        return self.mesh.multiply(self._product, x_TK, self.weight.shape[0])

    def _product(self, x_TK: Tensor, y_TN: Tensor | None = None) -> Tensor:
        if y_TN is not None and self.ops.linear_into is not None:
            return self.ops.linear_into(x_TK, self.weight, self.bias_N, y_TN)
        return self.ops.linear(x_TK, self.weight, self.bias_N, self.activation)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Adds ``x`` to the residual stream, then divides by the root of the mean square.

    Where ``x`` is what each rank has made of its own columns, ``mesh`` are those over which it is
    summed first; where it is whole, nobody.
    """

    ops: Ops
    weight_C: Tensor
    eps: float
    mesh: Mesh = ALONE

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None) -> tuple[Tensor, Tensor]:
        """→ (normed, the new residual)."""
        if self.mesh.add_norm is not None:
            return self.mesh.add_norm(x_TC, residual_TC, self.weight_C, None, self.eps)
        return self.ops.rms_norm(self.mesh.reduce(x_TC), residual_TC, self.weight_C, self.eps)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Adds ``x`` to the residual stream, then takes the mean away and divides by the deviation;
    ``mesh`` is as `RMSNorm` has it."""

    ops: Ops
    weight_C: Tensor
    bias_C: Tensor
    eps: float
    mesh: Mesh = ALONE

    def __call__(self, x_TC: Tensor, residual_TC: Tensor | None) -> tuple[Tensor, Tensor]:
        """→ (normed, the new residual)."""
        if self.mesh.add_norm is not None:
            return self.mesh.add_norm(x_TC, residual_TC, self.weight_C, self.bias_C, self.eps)
        x_TC = self.mesh.reduce(x_TC)
        return self.ops.layer_norm(x_TC, residual_TC, self.weight_C, self.bias_C, self.eps)


def norm_linear(
    norm: RMSNorm | LayerNorm, linear: Linear, x_TC: Tensor, residual_TC: Tensor | None
) -> tuple[Tensor, Tensor]:
    """→ (linear(norm(x + residual)), x + residual), in one operation where there is one. Ranks may
    share the rows of the product, not its columns."""
    fused = linear.ops.norm_linear
    if fused is None or norm.mesh.add_norm is not None:
        x_TC, residual_TC = norm(x_TC, residual_TC)
        return linear(x_TC), residual_TC
    return fused(
        norm.mesh.reduce(x_TC),
        residual_TC,
        norm.weight_C,
        norm.bias_C if isinstance(norm, LayerNorm) else None,
        norm.eps,
        linear.weight,
        linear.bias_N,
        linear.activation,
    )


@dataclass(frozen=True, slots=True)
class Attention:
    """Stores keys and values, and lets the queries read their sequence's past."""

    ops: Ops
    spec: AttentionSpec
    rope: Rope | None = None
    q_norm_D: Tensor | None = None
    k_norm_D: Tensor | None = None
    eps: float = 0.0  # of the two norms
    sinks_H: Tensor | None = None

    def __call__(
        self, qkv_TE: Tensor, batch: ForwardBatch, k_cache_BGPD: Tensor, v_cache_BGPD: Tensor
    ) -> Tensor:
        """→ the heads side by side [T, H * D], before the output projection."""
        arguments = (
            qkv_TE,
            batch,
            k_cache_BGPD,
            v_cache_BGPD,
            self.spec,
            self.rope,
            self.q_norm_D,
            self.k_norm_D,
            self.eps,
        )
        if self.ops.attend is not None:
            return self.ops.attend(*arguments, self.sinks_H)
        q_THD = self.ops.write_kv(*arguments)
        caches = k_cache_BGPD, v_cache_BGPD
        return self.ops.attention(q_THD, *caches, batch, self.spec, self.sinks_H)


@dataclass(frozen=True, slots=True)
class Mixture:
    """Sends each token through the experts that the router chooses for it."""

    ops: Ops
    router: Packed
    router_bias_E: Tensor | None
    experts: PackedExperts

    def __call__(self, x_TC: Tensor) -> Tensor:
        """→ the weighted sum of what the chosen experts make of it; or, where each rank has a part
        of every expert, a summand of that."""
        assert self.ops.experts is not None, "a backend without experts was refused before"
        return self.ops.experts(x_TC, self.router, self.router_bias_E, self.experts)


def norm_mixture(
    norm: RMSNorm, mixture: Mixture, x_TC: Tensor, residual_TC: Tensor | None
) -> tuple[Tensor, Tensor]:
    """→ (mixture(norm(x + residual)), x + residual), in one operation where there is one, of few
    tokens also where ranks could sum with the norm."""
    ops, fused = mixture.ops, mixture.ops.norm_experts
    sums = norm.mesh.add_norm is not None
    if fused is None or (sums and len(x_TC) > ops.norm_experts_rows):
        x_TC, residual_TC = norm(x_TC, residual_TC)
        return mixture(x_TC), residual_TC
    router, x_TC = (mixture.router, mixture.router_bias_E), norm.mesh.reduce(x_TC)
    return fused(x_TC, residual_TC, norm.weight_C, norm.eps, *router, mixture.experts)


def attention_spec(spec: ModelSpec, layer: int) -> AttentionSpec:
    """One layer's attention in numbers, with the heads that ``spec`` has."""
    return AttentionSpec(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        scale=spec.query_scale or spec.head_dim**-0.5,
        window=spec.windows[layer],
        cache_group=place_of(cache_groups(spec), layer)[0],
    )


def load_tables(weights: Weights, spec: ModelSpec) -> tuple[Packed | None, Packed | None]:
    """The embedding table, on the first stage, and the head, on the last: one and the same if both
    are here and it is."""
    shape, mesh = (spec.vocab_size, spec.hidden_size), weights.share.mesh
    embed_key, head_key = _table_keys(weights, spec)
    embed = weights.table(embed_key, *shape) if mesh.is_first else None
    if not mesh.is_last:
        return embed, None
    same = embed is not None and head_key == embed_key
    return embed, embed if same else weights.table(head_key, *shape)


def _table_keys(weights: Weights, spec: ModelSpec) -> tuple[str, str]:
    """Which matrices embedding and head are: one where the config ties them, unless the checkpoint
    has both and they differ. What is there counts more than what is said of it, as in
    transformers."""
    if not spec.tie_embeddings:
        return "embed", "head"
    if not weights.holds("head"):
        return "embed", "embed"
    if not weights.holds("embed"):
        return "head", "head"
    if weights.equal("embed", "head", spec.vocab_size, spec.hidden_size):
        return "embed", "embed"
    log.warning("untied_head", reason="it differs from the embedding the config ties it to")
    return "embed", "head"


def load_linear(
    weights: Weights,
    key: str,
    rows: Sequence[int],
    columns: int,
    layer: int,
    *,
    bias: bool,
    activation: Activation = "none",
) -> Linear:
    """The projection ``key`` of a layer; ``rows`` are those of its parts."""
    bias_N = weights.bias(key, rows, layer) if bias else None
    weight = weights.matrix(key, rows, columns, layer)
    summed = weights.rules[key].columns is not None and weights.ops.linear_into is not None
    mesh = weights.share.mesh if summed else ALONE
    return Linear(weights.ops, weight, bias_N, activation, mesh)


def load_rms_norm(weights: Weights, key: str, size: int, eps: float, layer: int = 0) -> RMSNorm:
    """The norm ``key``, of what ranks have to add up."""
    mesh = mesh_before(weights.share, key, layer)
    return RMSNorm(weights.ops, weights.norm(key, size, layer), eps, mesh)


def load_layer_norm(weights: Weights, key: str, size: int, eps: float, layer: int = 0) -> LayerNorm:
    """The norm ``key``, of what ranks have to add up."""
    weight_C, bias_C = (weights.norm(key, size, layer, kind) for kind in ("weight", "bias"))
    return LayerNorm(weights.ops, weight_C, bias_C, eps, mesh_before(weights.share, key, layer))


def mesh_before(share: Share, key: str, layer: int) -> Mesh:
    """Over whose ranks the norm ``key`` sums what it is given. A stage behind the first one is sent
    whole rows."""
    sent = key == "attn_norm" and layer == share.layers.start and not share.mesh.is_first
    return ALONE if sent else share.mesh
