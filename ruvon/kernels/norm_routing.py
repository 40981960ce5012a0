"""Residual addition, norm, router and choice in one launch, for the few tokens of small steps.

Each program takes a token and some experts: it norms the token, which costs less than to wait for
another kernel that did, and multiplies it by its experts' rows of the router, loaded before the
wait. The last to come chooses for all tokens and sorts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.norm import normalize
from ruvon.kernels.ops import ExpertsSpec, Packed
from ruvon.kernels.pdl import release, wait
from ruvon.kernels.routing import (
    BLOCK_T,
    Routing,
    block_tiles,
    choose,
    make_routing,
    sort_few,
)
from ruvon.kernels.split_k import Workspace

FEW_TOKENS = BLOCK_T.value
SUMMED_TOKENS = 8  # for which this is faster than a norm behind a sum of ranks, and a choice
EACH = 4  # experts of one program


@triton.jit(do_not_specialize=["T", "NUM_TILES"])
def _norm_choose_kernel(
    x_ptr,
    residual_ptr,
    gain_ptr,
    router_ptr,
    bias_ptr,
    normed_ptr,
    total_ptr,
    routing,  # Routing
    counters_ptr,
    logits_ptr,  # float32 [T, BLOCK_E], to share them
    T,
    E,
    K,
    x_stride,
    eps,
    NUM_TILES,
    EACH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    token, part = tl.program_id(0), tl.program_id(1)
    mine, columns = part * EACH + tl.arange(0, EACH), tl.arange(0, BLOCK_K)
    inside = columns < K
    router_at = router_ptr + mine[:, None] * K + columns[None, :]
    router = tl.load(router_at, mask=(mine < E)[:, None] & inside[None, :], other=0.0)
    gain = tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    wait(PDL)
    release(PDL)  # not before, so that the experts' programs spread: see ruvon.kernels.pdl
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        x = x + tl.load(residual_ptr + token * K + columns, mask=inside, other=0.0)
    normed = normalize(x, gain, gain, inside, K, eps, False).to(x.dtype)
    if part == 0:
        tl.store(normed_ptr + token * K + columns, normed, mask=inside)
        if HAS_RESIDUAL:
            tl.store(total_ptr + token * K + columns, x, mask=inside)
    product = tl.sum(router.to(tl.float32) * normed.to(tl.float32)[None, :], axis=1)
    tl.store(logits_ptr + token * BLOCK_E + mine, product, mask=mine < BLOCK_E)
    tl.debug_barrier()  # every thread's part is written before one thread says so
    programs = T * tl.num_programs(1)
    if tl.atomic_add(counters_ptr, 1, sem="acq_rel") == programs - 1:
        tl.store(counters_ptr, 0)
        tokens, experts = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
        at = logits_ptr + tokens[:, None] * BLOCK_E + experts[None, :]
        logits = tl.load(at, mask=(tokens < T)[:, None], other=0.0, cache_modifier=".cg")
        if HAS_BIAS:
            bias = tl.load(bias_ptr + experts, mask=experts < E, other=0.0)
            logits += bias.to(tl.float32)[None, :]
        chosen, valid = choose(
            logits, tokens, experts, routing, T, E, RENORMALIZE, TOP_K, BLOCK_CHOICES
        )
        sort_few(chosen, valid, routing, NUM_TILES, TOP_K, BLOCK_E, TILE, BLOCK_TILES)


def norm_route(
    x_TC: Tensor,
    residual_TC: Tensor | None,
    norm_weight_C: Tensor,
    eps: float,
    router: Packed,
    bias_E: Tensor | None,
    spec: ExpertsSpec,
    tile: int,
    workspace: Workspace,
    pdl: bool,
) -> tuple[Tensor, Tensor, Routing]:
    """(RMSNorm of x + residual, that sum, the choices) for at most `FEW_TOKENS` tokens."""
    tokens, k = x_TC.shape
    routing = make_routing(tokens, spec, tile, x_TC.device)
    normed_TC = torch.empty(tokens, k, dtype=x_TC.dtype, device=x_TC.device)
    total_TC = x_TC if residual_TC is None else torch.empty_like(normed_TC)
    block_k = triton.next_power_of_2(k)
    _norm_choose_kernel[(tokens, triton.cdiv(spec.num_experts, EACH))](
        x_TC,
        residual_TC,
        norm_weight_C,
        router.tensors[0],
        bias_E,
        normed_TC,
        total_TC,
        routing,
        workspace.counters,
        workspace.partial,
        tokens,
        spec.num_experts,
        k,
        x_TC.stride(0),
        eps,
        routing.tiles.shape[0],
        EACH=EACH,
        BLOCK_K=block_k,
        BLOCK_E=max(16, triton.next_power_of_2(spec.num_experts)),
        HAS_RESIDUAL=residual_TC is not None,
        HAS_BIAS=bias_E is not None,
        TOP_K=spec.top_k,
        BLOCK_CHOICES=triton.next_power_of_2(spec.top_k),
        RENORMALIZE=spec.renormalize,
        TILE=tile,
        BLOCK_TILES=block_tiles(spec, tile),
        PDL=pdl,
        num_warps=4 if block_k <= 1024 else 8,
        launch_pdl=pdl,
    )
    return normed_TC, total_TC, routing
