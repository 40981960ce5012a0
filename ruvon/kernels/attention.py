"""Attention over the paged cache, for ragged batches.

Two kernels share the work by how many queries a sequence has in this step: `decode` takes sequences
with one, `prefill` the others. A decode-only step launches the first alone, which then also stores
the new keys and values (`attend`).
"""

from __future__ import annotations

from torch import Tensor

from ruvon.kernels.decode import Workspace, launch_decode
from ruvon.kernels.kv import write_kv
from ruvon.kernels.ops import AttentionSpec, ForwardBatch, Rope
from ruvon.kernels.prefill import launch_prefill


def attention(
    q_THD: Tensor,
    k_cache_BGPD: Tensor,
    v_cache_BGPD: Tensor,
    batch: ForwardBatch,
    spec: AttentionSpec,
    sinks_H: Tensor | None,
    workspace: Workspace,
    pdl: bool = False,
    batch_invariant: bool = False,
) -> Tensor:
    """As the reference. Rows of padding (sequences with no queries) are left as they are.

    Where ``batch_invariant``, the prefill kernel takes all sequences: then neither how many there
    are nor how a prompt is cut into chunks changes a bit.
    """
    out_TE = q_THD.new_empty(q_THD.shape[0], spec.num_heads * spec.head_dim)
    caches = k_cache_BGPD, v_cache_BGPD
    if batch_invariant:
        launch_prefill(q_THD, *caches, batch, spec, sinks_H, out_TE, pdl, fewest=1)
        return out_TE
    if batch.max_query > 1:
        launch_prefill(q_THD, *caches, batch, spec, sinks_H, out_TE, pdl, fewest=2)
    launch_decode(q_THD, *caches, batch, spec, sinks_H, out_TE, workspace, pdl)
    return out_TE


def attend(
    qkv_TE: Tensor,
    batch: ForwardBatch,
    k_cache_BGPD: Tensor,
    v_cache_BGPD: Tensor,
    spec: AttentionSpec,
    rope: Rope | None,
    q_norm_D: Tensor | None,
    k_norm_D: Tensor | None,
    eps: float,
    sinks_H: Tensor | None,
    workspace: Workspace,
    pdl: bool = False,
) -> Tensor:
    """`write_kv` and `attention`, in one launch where every sequence has one query."""
    if batch.max_query > 1:
        q_THD = write_kv(
            qkv_TE, batch, k_cache_BGPD, v_cache_BGPD, spec, rope, q_norm_D, k_norm_D, eps, pdl
        )
        return attention(q_THD, k_cache_BGPD, v_cache_BGPD, batch, spec, sinks_H, workspace, pdl)
    out_TE = qkv_TE.new_empty(qkv_TE.shape[0], spec.num_heads * spec.head_dim)
    launch_decode(
        qkv_TE, k_cache_BGPD, v_cache_BGPD, batch, spec, sinks_H, out_TE, workspace, pdl,
        fused=True, rope=rope, norms=None if q_norm_D is None else (q_norm_D, k_norm_D, eps),
    )  # fmt: skip
    return out_TE
