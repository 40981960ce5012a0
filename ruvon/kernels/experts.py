"""A mixture of experts: two products over tiles of entries, each by its expert's weights, a sum.

`ruvon.kernels.routing` sorts tokens by expert and cuts each expert's into tiles. A program takes a
tile and a block of the weight's rows, on the matrix unit's larger side, so that few tokens fill it,
too. The first product gathers tokens, and applies the activation; the second leaves each entry's
result where the entry is, so that a token's are added up in the order of its choices: the same bits
in every run. Grids depend on the number of tokens alone, so all of it can be captured.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ruvon.kernels.activation import sigmoid
from ruvon.kernels.expert_tiles import BATCH_INVARIANT, ExpertsTile, experts_tiles
from ruvon.kernels.expert_weights import GATES, PAIR
from ruvon.kernels.mxfp4 import GROUP, LINES, ROWS, Codes, multiply_mxfp4, multiply_split_mxfp4
from ruvon.kernels.norm import rms_norm
from ruvon.kernels.norm_routing import FEW_TOKENS, norm_route
from ruvon.kernels.ops import ExpertsSpec, Packed, PackedExperts
from ruvon.kernels.pdl import prefetch_block, release, wait
from ruvon.kernels.routing import Routing, most_tiles, route
from ruvon.kernels.split_k import Workspace
from ruvon.kernels.tiles import STREAMED_ROWS

ASKED = 18 << 20  # bytes; what L2 keeps beside what a product reads meanwhile


class Asking(NamedTuple):
    """Behind its work, a program of the first product's last ``tiles`` asks for its share of the
    expert's weight of the second product, ``each`` bytes: there memory has the least to do. The
    second begins with them."""

    tiles: int
    each: int


def _asking(weight: Codes | Tensor, spec: ExpertsSpec, tokens: int, pdl: bool) -> Asking:
    """One token's products wait for instructions, not for memory."""
    if not pdl or tokens == 1 or not isinstance(weight, Codes):
        return Asking(0, 0)
    each = weight.words.nbytes // spec.num_experts
    return Asking(ASKED // each, each)


@triton.jit
def _multiply_dense(
    sums, weight_desc, expert, first_row, x_at, used, x_desc, first_place,
    N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SORTED: tl.constexpr,
):  # fmt: skip
    """See `multiply_mxfp4`."""
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        weight = weight_desc.load([expert * N + first_row, k])
        if SORTED:
            x = x_desc.load([first_place, k]).T
        else:
            columns = k + tl.arange(0, BLOCK_K)
            mask = used[None, :] & (columns < K)[:, None]
            x = tl.load(x_at[None, :] + columns[:, None], mask=mask, other=0.0)
        sums = tl.dot(weight, x, sums, input_precision="ieee")
    return sums


@triton.jit
def _no_sums(ROWS: tl.constexpr, TOKENS: tl.constexpr):
    return tl.zeros([ROWS, TOKENS], tl.float32)


@triton.jit
def _gate(sums, CLAMPED: tl.constexpr):
    """[rows, T], gates and what they gate by turns of `PAIR` → [rows / 2, T]."""
    N: tl.constexpr = sums.shape[0]
    T: tl.constexpr = sums.shape[1]
    pairs = tl.permute(tl.reshape(sums, (N // (2 * PAIR), 2, PAIR, T)), (0, 2, 3, 1))
    gate, up = tl.split(pairs)
    if CLAMPED:
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        y = gate * sigmoid(1.702 * gate) * (up + 1.0)
    else:
        y = gate * sigmoid(gate) * up
    return tl.reshape(y, (N // 2, T))


@triton.jit
def _load_ends(
    bias_ptr, order_ptr, expert, rows, places, end, N: tl.constexpr, UP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """(the bias of ``rows``, the entries at ``places``, for the second product): for `_store`."""
    bias, entries = tl.zeros(rows.shape, tl.float32), places
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * N + rows, mask=rows < N, other=0.0)
    if not UP:
        entries = tl.load(order_ptr + places, mask=places < end, other=0)
    return bias, entries


@triton.jit
def _store(
    sums, out_ptr, bias, entries, first_row, rows, places, end, N: tl.constexpr, UP: tl.constexpr,
    GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A tile's sums, their bias, and in the first product the activation."""
    used = (places < end)[None, :]
    if HAS_BIAS:
        sums += bias.to(tl.float32)[:, None]
    if UP:
        outputs = first_row // 2 + tl.arange(0, sums.shape[0] // 2)
        at = out_ptr + places.to(tl.int64)[None, :] * (N // 2) + outputs[:, None]
        inside = used & (outputs < N // 2)[:, None]
        tl.store(at, _gate(sums, GATE).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        at = out_ptr + entries.to(tl.int64)[None, :] * N + rows[:, None]
        inside = used & (rows < N)[:, None]
        tl.store(at, sums.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile_product(
    x_ptr, x_desc, weight_desc, codes, bias_ptr, out_ptr, routing, x_stride, expert, first_row,
    first, end, TOKENS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr,
    UP: tl.constexpr, GATE: tl.constexpr, MXFP4: tl.constexpr, HAS_BIAS: tl.constexpr,
    SORTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Places ``first`` to ``end`` of the order, at most ``TOKENS``, by `TILE.rows` of a weight."""
    rows, places = first_row + tl.arange(0, TILE.rows), first + tl.arange(0, TOKENS)
    used = places < end
    order = routing.order
    # Before the product, so that nothing is waited for behind it; more tokens take all registers.
    if not SORTED:
        bias, entries = _load_ends(bias_ptr, order, expert, rows, places, end, N, UP, HAS_BIAS)
    if UP and not SORTED:
        sources = tl.load(order + places, mask=used, other=0) // TOP_K
    else:
        sources = tl.where(used, places, 0)
    x_at = x_ptr + sources.to(tl.int64) * x_stride
    sums = _no_sums(TILE.rows, TOKENS)
    if TILE.split:
        sums = multiply_split_mxfp4(
            codes, expert, first_row, x_at, used,
            N, K, TILE.rows, TILE.columns, TILE.warps, TILE.stages,
        )  # fmt: skip
    elif MXFP4:
        sums = multiply_mxfp4(
            sums, weight_desc, codes, expert, first_row, x_at, used, x_desc, first,
            N, K, TILE.columns, TILE.stages, SORTED, TILE.overlap,
        )  # fmt: skip
    else:
        sums = _multiply_dense(
            sums, weight_desc, expert, first_row, x_at, used, x_desc, first,
            N, K, TILE.columns, TILE.stages, SORTED,
        )  # fmt: skip
    if SORTED:
        bias, entries = _load_ends(bias_ptr, order, expert, rows, places, end, N, UP, HAS_BIAS)
    _store(sums, out_ptr, bias, entries, first_row, rows, places, end, N, UP, GATE, HAS_BIAS)


@triton.jit
def _experts_kernel(
    x_ptr,
    x_desc,  # of rows in order, or None
    few_desc,  # the same, in boxes for tiles of few tokens
    weight_desc,  # of the words of Codes, or of a dense weight; or None, if TILE.split
    codes,  # Codes, or None
    bias_ptr,
    out_ptr,
    routing,  # Routing
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    UP: tl.constexpr,  # tokens in and places of the order out; else from these to entries
    GATE: tl.constexpr,
    MXFP4: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SORTED: tl.constexpr,  # x has a row for each place of the order
    TILE: tl.constexpr,  # ExpertsTile
    second_ptr,  # the second product's weight, if the first is to ask for some of it
    ASKING: tl.constexpr,  # Asking
    LISTED: tl.constexpr,  # a power of two, at least as many as tiles where any ask
    PDL: tl.constexpr,
):
    block, tile = tl.program_id(0), tl.program_id(1)
    PADDED: tl.constexpr = (N + ROWS - 1) // ROWS * ROWS if MXFP4 else N
    first_row = tl.minimum(block * TILE.rows, PADDED - TILE.rows)  # the last may redo some
    # Neither releases before it has waited: so the other finds the choice made before it waits, and
    # what comes next, if it is few programs, finds all multiprocessors with as much room. For that,
    # of few programs none releases before its work is done: see ruvon.kernels.pdl.
    if UP:
        wait(PDL)
    elif ASKING.tiles > 0:  # from the last tile on: these were asked for
        places = tl.arange(0, LISTED)
        listed = places < tl.num_programs(1)
        there = tl.load(routing.tiles + places * 3, mask=listed, other=-1) >= 0
        tile = tl.sum(there.to(tl.int32)) - 1 - tile
    at = routing.tiles + tl.maximum(tile, 0) * 3
    expert, first, end = tl.where(tile < 0, -1, tl.load(at)), tl.load(at + 1), tl.load(at + 2)
    asks = tile < 0
    if UP and ASKING.tiles > 0:
        later = tile + ASKING.tiles
        listed = later < tl.num_programs(1)
        asks = (expert >= 0) & (tl.load(routing.tiles + later * 3, mask=listed, other=-1) < 0)
    if not UP:
        wait(PDL)
    if not TILE.late:
        release(PDL)
    if expert >= 0:
        if TILE.few and end - first <= TILE.few:
            _tile_product(
                x_ptr, few_desc, weight_desc, codes, bias_ptr, out_ptr, routing, x_stride,
                expert, first_row, first, end, TILE.few,
                N, K, TOP_K, UP, GATE, MXFP4, HAS_BIAS, SORTED, TILE,
            )  # fmt: skip
        else:
            _tile_product(
                x_ptr, x_desc, weight_desc, codes, bias_ptr, out_ptr, routing, x_stride,
                expert, first_row, first, end, TILE.tokens,
                N, K, TOP_K, UP, GATE, MXFP4, HAS_BIAS, SORTED, TILE,
            )  # fmt: skip
    if TILE.late:
        release(PDL)
    if UP and ASKING.tiles > 0:
        SHARE: tl.constexpr = ASKING.each // ((PADDED + TILE.rows - 1) // TILE.rows) // 16 * 16
        share_at = second_ptr.to(tl.int64) + expert.to(tl.int64) * ASKING.each + block * SHARE
        prefetch_block(share_at, SHARE, asks, PDL)


@triton.jit
def _sort_rows_kernel(
    x_ptr, order_ptr, out_ptr, x_stride, K, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A row for each place of the order, so that a tile's can be copied in bulk."""
    wait(PDL)
    release(PDL)  # see _experts_kernel
    place = tl.program_id(0).to(tl.int64)
    token = (tl.load(order_ptr + place) // TOP_K).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    row = tl.load(x_ptr + token * x_stride + columns, mask=columns < K)
    tl.store(out_ptr + place * K + columns, row, mask=columns < K)


@triton.jit
def _combine_kernel(
    parts_ptr, weights_ptr, out_ptr, C, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    release(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    wait(PDL)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(TOP_K):
        weight = tl.load(weights_ptr + token * TOP_K + i)
        at = parts_ptr + (token * TOP_K + i) * C + columns
        total += weight * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * C + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


Tiles: TypeAlias = tuple[ExpertsTile, ExpertsTile]


def experts(
    x_TC: Tensor,
    router: Packed,
    bias_E: Tensor | None,
    experts: PackedExperts,
    workspace: Workspace,
    pdl: bool = False,
    batch_invariant: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """The weighted sum of what each token's experts make of it."""
    spec, pdl = experts.spec, pdl and x_TC.shape[0] <= STREAMED_ROWS
    chosen = (BATCH_INVARIANT,) * 2 if batch_invariant else experts_tiles(x_TC.shape[0], experts)
    tiles = tiles or chosen
    routing = route(x_TC, router, bias_E, spec, tiles[0].tokens, workspace, pdl, batch_invariant)
    return _mix(x_TC, routing, experts, tiles, pdl)


def norm_experts(
    x_TC: Tensor,
    residual_TC: Tensor | None,
    norm_weight_C: Tensor,
    eps: float,
    router: Packed,
    bias_E: Tensor | None,
    experts: PackedExperts,
    workspace: Workspace,
    pdl: bool = False,
) -> tuple[Tensor, Tensor]:
    """(`experts` of the RMSNorm of x + residual, that sum): for few tokens in a launch less."""
    spec, tiles = experts.spec, experts_tiles(x_TC.shape[0], experts)
    pdl = pdl and x_TC.shape[0] <= STREAMED_ROWS  # beside cuBLAS's products early starts cost time
    norm = (x_TC, residual_TC, norm_weight_C, eps)
    if x_TC.shape[0] <= FEW_TOKENS:
        normed_TC, total_TC, routing = norm_route(
            *norm, router, bias_E, spec, tiles[0].tokens, workspace, pdl
        )
    else:
        normed_TC, total_TC = rms_norm(*norm, pdl)
        routing = route(normed_TC, router, bias_E, spec, tiles[0].tokens, workspace, pdl)
    return _mix(normed_TC, routing, experts, tiles, pdl), total_TC


def _mix(x_TC: Tensor, routing: Routing, experts: PackedExperts, tiles: Tiles, pdl: bool) -> Tensor:
    tensors = experts.tensors
    if experts.kind == "mxfp4":
        weights: list[Codes | Tensor] = [Codes(*tensors[:3]), Codes(*tensors[3:6])]  # type: ignore[arg-type]
    else:
        weights = [tensors[0], tensors[1]]  # type: ignore[list-item]
    if tiles[0].bulk:
        x_TC = _sort_rows(x_TC, routing, pdl)
    spec, hidden = experts.spec, x_TC.shape[1]
    asking = _asking(weights[1], spec, routing.chosen.shape[0], pdl)
    layer = (routing, spec, asking, pdl)
    inner = _product(x_TC, weights[0], tensors[-2], tiles[0], *layer, second=weights[1])
    parts = _product(inner, weights[1], tensors[-1], tiles[1], *layer, hidden=hidden)
    return combine(parts, routing, pdl)


def _sort_rows(x_TC: Tensor, routing: Routing, pdl: bool) -> Tensor:
    entries, columns = routing.order.shape[0], x_TC.shape[1]
    out = x_TC.new_empty(entries, columns)
    _sort_rows_kernel[(entries,)](
        x_TC, routing.order, out, x_TC.stride(0), columns, TOP_K=routing.chosen.shape[1],
        BLOCK=triton.next_power_of_2(columns), PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip
    return out


def _product(
    x_TK: Tensor,
    weight: Codes | Tensor,  # [E, N, K]
    bias_N: Tensor | None,
    tile: ExpertsTile,
    routing: Routing,
    spec: ExpertsSpec,
    asking: Asking,
    pdl: bool,
    second: Codes | Tensor | None = None,  # the other product's weight, where this is the first
    hidden: int = 0,  # outputs of an expert, where this is the second
) -> Tensor:
    codes = weight if isinstance(weight, Codes) else None
    n, k = hidden or 2 * spec.width, x_TK.shape[1]
    if x_TK.dtype == torch.float32:  # or shared memory would not hold the larger ones
        tile = tile._replace(columns=64 * tile.warps if tile.split else 64, stages=2)
    tile, weight_desc = (tile, None) if tile.split else _boxes(weight, n, tile)
    x_desc, few_desc = (
        TensorDescriptor.from_tensor(x_TK, [tokens, tile.columns]) if tile.bulk and tokens else None
        for tokens in (tile.tokens, tile.few)
    )
    out_TN = x_TK.new_empty(routing.order.shape[0], hidden or spec.width)
    _experts_kernel[(triton.cdiv(n, tile.rows), routing.tiles.shape[0])](
        x_TK, x_desc, few_desc, weight_desc, codes, bias_N, out_TN, routing,
        x_TK.stride(0), N=n, K=k, TOP_K=spec.top_k, UP=not hidden, GATE=GATES[spec.activation],
        MXFP4=codes is not None, HAS_BIAS=bias_N is not None, SORTED=tile.bulk, TILE=tile,
        second_ptr=second.words if isinstance(second, Codes) else None, ASKING=asking,
        LISTED=triton.next_power_of_2(most_tiles(STREAMED_ROWS, spec, tile.tokens)),
        PDL=pdl, num_warps=tile.warps, launch_pdl=pdl,
    )  # fmt: skip
    return out_TN


def _boxes(
    weight: Codes | Tensor, n: int, tile: ExpertsTile
) -> tuple[ExpertsTile, TensorDescriptor]:
    """(the tile with no more rows than an expert has, ``n``, the weight in boxes of its size)."""
    each = ROWS.value if isinstance(weight, Codes) else 1
    most = 1 << triton.cdiv(n, each).bit_length() - 1
    tile = tile._replace(rows=min(tile.rows // each, most) * each)
    if isinstance(weight, Codes):
        box = [tile.rows // each, tile.columns // GROUP.value * LINES.value, 64]
        return tile, TensorDescriptor.from_tensor(weight.words, box)
    return tile, TensorDescriptor.from_tensor(weight.flatten(0, 1), [tile.rows, tile.columns])


def combine(parts_EC: Tensor, routing: Routing, pdl: bool) -> Tensor:
    """Entries' results, a token's one after another, into its weighted sum."""
    tokens, top_k = routing.weights.shape
    columns = parts_EC.shape[1]
    out_TC = parts_EC.new_empty(tokens, columns)
    block = min(1024, triton.next_power_of_2(columns))
    _combine_kernel[(tokens, triton.cdiv(columns, block))](
        parts_EC, routing.weights, out_TC, columns, TOP_K=top_k, BLOCK=block, PDL=pdl,
        launch_pdl=pdl,
    )  # fmt: skip
    return out_TC
