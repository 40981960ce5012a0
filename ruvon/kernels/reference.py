"""The plain-torch meaning of every operation in `Ops`: short, obvious, and the oracle of the tests.

Runs on any device and dtype. Norms, softmax and rotations compute in float32 and cast last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ruvon.kernels.ops import (
    Activation,
    AttentionSpec,
    Dense,
    Experts,
    ExpertsSpec,
    ForwardBatch,
    Ops,
    Packed,
    PackedExperts,
    Rope,
    Weight,
)


def make_torch_ops(dtype: torch.dtype, device: torch.device) -> Ops:
    """The table of this file, computing in ``dtype`` on ``device``."""

    def pack(weight: Weight) -> Packed:
        dense = weight.weight_NK if isinstance(weight, Dense) else weight.dequantize()
        n, k = dense.shape
        return Packed("dense", (n, k), (dense.to(device=device, dtype=dtype).contiguous(),))

    def pack_experts(experts: Experts, spec: ExpertsSpec) -> PackedExperts:
        up, down = (pack(weight).tensors[0] for weight in (experts.up, experts.down))
        biases = (
            bias if bias is None else bias.to(device=device, dtype=dtype)
            for bias in (experts.up_bias_N, experts.down_bias_N)
        )
        return PackedExperts("dense", spec, (up, down, *biases))

    return Ops(
        name="torch",
        pack=pack,
        embed=embed,
        add=torch.add,
        rms_norm=rms_norm,
        layer_norm=layer_norm,
        linear=linear,
        linear_into=linear_into,
        write_kv=write_kv,
        attention=attention,
        gather_rows=gather_rows,
        logits=logits,
        pack_experts=pack_experts,
        experts=experts,
        dtype=dtype,
        device=device,
    )


def embed(ids_T: Tensor, table: Packed, first: int | None = None) -> Tensor:
    if first is None:
        return F.embedding(ids_T, table.tensors[0])
    rows_T = ids_T - first
    inside_T = (rows_T >= 0) & (rows_T < table.shape[0])
    x_TC = F.embedding(rows_T.where(inside_T, 0), table.tensors[0])
    return x_TC * inside_T.unsqueeze(-1)


def gather_rows(x_TC: Tensor, rows_L: Tensor) -> Tensor:
    return x_TC.index_select(0, rows_L)


def logits(x_LC: Tensor, head: Packed) -> Tensor:
    return F.linear(x_LC, head.tensors[0]).float()


def rms_norm(
    x_TC: Tensor, residual_TC: Tensor | None, weight_C: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x_TC if residual_TC is None else x_TC + residual_TC
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight_C.float()
    return normed.to(x_TC.dtype), total


def layer_norm(
    x_TC: Tensor, residual_TC: Tensor | None, weight_C: Tensor, bias_C: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x_TC if residual_TC is None else x_TC + residual_TC
    normed = F.layer_norm(total.float(), (x_TC.shape[-1],), weight_C.float(), bias_C.float(), eps)
    return normed.to(x_TC.dtype), total


def activate(x_TN: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "none":
            return x_TN
        case "gelu_tanh":
            return F.gelu(x_TN, approximate="tanh")
        case "gelu":
            return F.gelu(x_TN)
        case "relu":
            return F.relu(x_TN)
        case "silu":
            return F.silu(x_TN)
        case "silu_gated":
            gate, up = x_TN.chunk(2, dim=-1)
            return F.silu(gate) * up
        case "gelu_tanh_gated":
            gate, up = x_TN.chunk(2, dim=-1)
            return F.gelu(gate, approximate="tanh") * up
        case "swiglu_clamped":
            gate, up = x_TN.chunk(2, dim=-1)
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def linear(x_TK: Tensor, weight: Packed, bias_N: Tensor | None, activation: Activation) -> Tensor:
    return activate(F.linear(x_TK, weight.tensors[0], bias_N), activation)


def linear_into(x_TK: Tensor, weight: Packed, bias_N: Tensor | None, y_TN: Tensor) -> Tensor:
    return y_TN.copy_(linear(x_TK, weight, bias_N, "none"))


def route(
    x_TC: Tensor, router: Packed, bias_E: Tensor | None, spec: ExpertsSpec
) -> tuple[Tensor, Tensor]:
    """→ (each token's experts [T, top_k], their float32 weights)."""
    bias = None if bias_E is None else bias_E.float()
    logits_TE = F.linear(x_TC.float(), router.tensors[0].float(), bias)
    if not spec.renormalize:
        weights, chosen = logits_TE.softmax(-1).topk(spec.top_k)
        return chosen, weights
    kept, chosen = logits_TE.topk(spec.top_k)
    return chosen, kept.softmax(-1)


def experts(x_TC: Tensor, router: Packed, bias_E: Tensor | None, experts: PackedExperts) -> Tensor:
    spec = experts.spec
    up, down, up_bias, down_bias = (_by_expert(x, spec.num_experts) for x in experts.tensors)
    chosen, weights = route(x_TC, router, bias_E, spec)
    y_TC = torch.zeros_like(x_TC, dtype=torch.float32)
    for e in chosen.unique().tolist():
        rows, place = (chosen == e).nonzero(as_tuple=True)
        hidden = activate(F.linear(x_TC[rows], up[e], up_bias[e]), spec.activation)
        out = F.linear(hidden, down[e], down_bias[e])
        y_TC.index_add_(0, rows, out.float() * weights[rows, place, None])
    return y_TC.to(x_TC.dtype)


def _by_expert(x: Tensor | None, count: int) -> Sequence[Any]:
    return (None,) * count if x is None else x.chunk(count)


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate-half on the first ``2 * cos.shape[-1]`` dims, in float32; the rest pass through."""
    half = cos_TD.shape[-1]
    wide = x_THD.float()
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    cos, sin = cos_TD.unsqueeze(1), sin_TD.unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x_THD.dtype)


def write_kv(
    qkv_TE: Tensor,
    batch: ForwardBatch,
    k_cache_BGPD: Tensor,
    v_cache_BGPD: Tensor,
    spec: AttentionSpec,
    rope: Rope | None,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
) -> Tensor:
    heads, groups, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    q: Tensor
    q, k, v = qkv_TE.view(-1, heads + 2 * groups, dim).split((heads, groups, groups), dim=1)
    if q_norm_D is not None:
        q = rms_norm(q, None, q_norm_D, eps)[0]
    if k_norm_D is not None:
        k = rms_norm(k, None, k_norm_D, eps)[0]
    if rope is not None:
        cos, sin = rope.cos_PD[batch.positions], rope.sin_PD[batch.positions]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    page = k_cache_BGPD.shape[2]
    slots = batch.paged[spec.cache_group].slots
    block, offset = slots // page, slots % page
    k_cache_BGPD[block, :, offset] = k.to(k_cache_BGPD.dtype)
    v_cache_BGPD[block, :, offset] = v.to(v_cache_BGPD.dtype)
    return q


def attention(
    q_THD: Tensor,
    k_cache_BGPD: Tensor,
    v_cache_BGPD: Tensor,
    batch: ForwardBatch,
    spec: AttentionSpec,
    sinks_H: Tensor | None,
) -> Tensor:
    out = torch.empty_like(q_THD)
    starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
    page = k_cache_BGPD.shape[2]
    for s, context in enumerate(contexts):
        rows = slice(starts[s], starts[s + 1])
        first_seen = context - (rows.stop - rows.start) - spec.window + 1 if spec.window else 0
        skipped = max(first_seen, 0) // page  # blocks
        blocks = batch.paged[spec.cache_group].block_tables[s, skipped : -(-context // page)]
        k, v = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[:, : context - skipped * page].float()
            for cache in (k_cache_BGPD, v_cache_BGPD)  # [G, keys, D]
        )
        out[rows] = attend_one(q_THD[rows], k, v, spec, sinks_H).to(out.dtype)
    return out.flatten(1)


def attend_one(
    q_QHD: Tensor, k_GXD: Tensor, v_GXD: Tensor, spec: AttentionSpec, sinks_H: Tensor | None
) -> Tensor:
    """One sequence's queries, the last Q of its X last positions, over their keys. float32 in and
    out."""
    weights_HQX = attention_weights(q_QHD, k_GXD, spec, sinks_H)
    v_HXD = v_GXD.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=0)
    return torch.einsum("hqx,hxd->qhd", weights_HQX, v_HXD)


def attention_weights(
    q_QHD: Tensor, k_GXD: Tensor, spec: AttentionSpec, sinks_H: Tensor | None
) -> Tensor:
    """How much of each key's value a query takes, [H, Q, X]; what a sink takes is in none."""
    num, context = q_QHD.shape[0], k_GXD.shape[1]
    k = k_GXD.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=0)
    scores = torch.einsum("qhd,hxd->hqx", q_QHD.float(), k) * spec.scale
    query_at = torch.arange(context - num, context, device=k.device).unsqueeze(1)
    key_at = torch.arange(context, device=k.device).unsqueeze(0)
    hidden = key_at > query_at
    if spec.window:
        hidden |= key_at <= query_at - spec.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks_H is None:
        return scores.softmax(-1)
    sink = sinks_H.float().view(-1, 1, 1).expand(-1, num, 1)
    return torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
