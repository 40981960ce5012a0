"""Which experts each token goes to, and in which order their work lies: all on the device.

A token's choice among ``top_k`` is an *entry*. Entries are sorted by expert, and an expert's are
cut into *tiles* of at most so many: a list of tiles, padded with -1 to a length that the number of
tokens alone decides, is the grid of the products in `ruvon.kernels.experts`. Nothing here adds up
in an order that depends on timing.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvon.kernels.ops import ExpertsSpec, Packed
from ruvon.kernels.pdl import release, wait
from ruvon.kernels.split_k import SPLIT_K_PROGRAMS, Workspace, plan_split_k, reduce_split_k

BLOCK_T = tl.constexpr(16)  # tokens of one program that chooses
LOWEST = tl.constexpr(-1e38)  # of logits


class Routing(NamedTuple):
    """A step's choices, as the experts' kernels read them."""

    chosen: Tensor  # int32 [T, top_k]
    weights: Tensor  # float32 [T, top_k]
    order: Tensor  # int32 [T * top_k]: entries, token * top_k + choice, by expert
    tiles: Tensor  # int32 [tiles, 3]: an expert or -1, its tile's first place in the order, its end


@triton.jit
def choose(
    logits, tokens, experts, routing, T, E,
    RENORMALIZE: tl.constexpr, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Stores what the logits [tokens, experts] choose; → (the choices, which of them are any),
    [tokens, BLOCK_K]. Each expert is chosen once, whatever the logits: rows of padding may be
    anything, and tiles are as many as such a choice can need."""
    choices = tl.arange(0, BLOCK_K)[None, :]
    logits = tl.where(logits > LOWEST, logits, LOWEST)  # what is no number, too
    logits = tl.where((experts < E)[None, :], logits, float("-inf"))
    top = tl.max(logits, axis=1)
    total = tl.sum(tl.exp(logits - top[:, None]), axis=1)
    chosen = tl.zeros([logits.shape[0], BLOCK_K], tl.int32)
    weights = tl.zeros([logits.shape[0], BLOCK_K], tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.max(logits, axis=1)
        place = tl.min(tl.where(logits == best[:, None], experts[None, :], E - 1), axis=1)
        chosen = tl.where(choices == i, place[:, None], chosen)
        weights = tl.where(choices == i, tl.exp(best - top)[:, None], weights)
        logits = tl.where(experts[None, :] == place[:, None], float("-inf"), logits)
    if RENORMALIZE:
        total = tl.sum(weights, axis=1)
    valid = (tokens < T)[:, None] & (choices < TOP_K)
    at = tokens[:, None] * TOP_K + choices
    tl.store(routing.chosen + at, chosen, mask=valid)
    tl.store(routing.weights + at, weights / total[:, None], mask=valid)
    return chosen, valid


@triton.jit
def _store_tiles(
    tiles_ptr, experts, counts, first, num_tiles, NUM_TILES, MOST: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """An expert's ``first`` tiles on; ``MOST`` of one expert. -1 behind all of them."""
    tiles = tl.cdiv(counts, TILE)
    before = tl.cumsum(tiles, axis=0) - tiles
    for i in tl.static_range(MOST):
        at = tiles_ptr + (before + i) * 3
        tl.store(at, experts, mask=i < tiles)
        tl.store(at + 1, first + i * TILE, mask=i < tiles)
        tl.store(at + 2, tl.minimum(first + (i + 1) * TILE, first + counts), mask=i < tiles)
    rest = tl.arange(0, BLOCK)
    tl.store(tiles_ptr + rest * 3, -1, mask=(rest >= num_tiles) & (rest < NUM_TILES))


@triton.jit
def sort_few(
    chosen, valid, routing, NUM_TILES, TOP_K: tl.constexpr, BLOCK_E: tl.constexpr,
    TILE: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Entries ``chosen [BLOCK_T, BLOCK_K]`` into order, by one program."""
    COUNT: tl.constexpr = chosen.shape[0] * chosen.shape[1]
    BLOCK_K: tl.constexpr = chosen.shape[1]
    places, experts = tl.arange(0, COUNT), tl.arange(0, BLOCK_E)
    chosen = tl.reshape(tl.where(valid, chosen, BLOCK_E), (COUNT,))
    mine = (chosen[:, None] == experts[None, :]).to(tl.int32)
    counts = tl.sum(mine, axis=0)
    first = tl.cumsum(counts, axis=0) - counts
    at = tl.sum(mine * (tl.cumsum(mine, axis=0) - 1 + first[None, :]), axis=1)
    entries = places // BLOCK_K * TOP_K + places % BLOCK_K
    tl.store(routing.order + at, entries, mask=chosen < BLOCK_E)
    num_tiles = tl.sum(tl.cdiv(counts, TILE))
    most: tl.constexpr = (BLOCK_T + TILE - 1) // TILE
    _store_tiles(
        routing.tiles, experts, counts, first, num_tiles, NUM_TILES, most, TILE, BLOCK_TILES
    )


@triton.jit(do_not_specialize=["T", "NUM_TILES"])
def _choose_kernel(
    x_ptr, router_ptr, bias_ptr, routing, counters_ptr, partial_ptr,
    T, E, x_stride, NUM_TILES, K: tl.constexpr,
    PER_SPLIT: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, TOP_K: tl.constexpr, BLOCK_CHOICES: tl.constexpr,
    RENORMALIZE: tl.constexpr, SORT: tl.constexpr, TILE: tl.constexpr, BLOCK_TILES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    tokens = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, BLOCK_E)
    wait(PDL)
    release(PDL)  # so that what comes next may read what was before this
    x_at = x_ptr + tokens.to(tl.int64)[:, None] * x_stride
    router_at = router_ptr + tl.minimum(experts, E - 1)[None, :] * K
    first = split * PER_SPLIT
    sums = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for k in tl.range(first, tl.minimum(first + PER_SPLIT, K), BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        inside = columns < tl.minimum(first + PER_SPLIT, K)
        x = tl.load(x_at + columns[None, :], mask=(tokens < T)[:, None] & inside[None, :], other=0)
        router = tl.load(router_at + columns[:, None], mask=inside[:, None], other=0)
        sums = tl.dot(x, router, sums, input_precision="ieee")
    sums, finishing = reduce_split_k(
        sums, tile, split, counters_ptr, partial_ptr, SPLIT_K, BLOCK_T, BLOCK_E
    )
    if finishing:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + experts, mask=experts < E, other=0.0)
            sums += bias.to(tl.float32)[None, :]
        chosen, valid = choose(
            sums, tokens, experts, routing, T, E, RENORMALIZE, TOP_K, BLOCK_CHOICES
        )
        if SORT:
            sort_few(chosen, valid, routing, NUM_TILES, TOP_K, BLOCK_E, TILE, BLOCK_TILES)


@triton.jit(do_not_specialize=["COUNT", "NUM_TILES", "TILE"])
def _sort_kernel(
    routing, COUNT, E, NUM_TILES, TILE, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program puts the entries of one expert into order: it counts all of them, then its own."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    wait(PDL)
    release(PDL)
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in tl.range(0, COUNT, BLOCK):
        places = start + tl.arange(0, BLOCK)
        chosen = tl.load(routing.chosen + places, mask=places < COUNT, other=0)
        counts += tl.histogram(chosen, BLOCK_E, mask=places < COUNT)
    tiles = tl.cdiv(counts, TILE)
    first = tl.sum(tl.where(experts < expert, counts, 0))
    count = tl.sum(tl.where(experts == expert, counts, 0))
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0))
    at = first
    for start in tl.range(0, COUNT, BLOCK):
        places = start + tl.arange(0, BLOCK)
        mine = tl.load(routing.chosen + places, mask=places < COUNT, other=-1) == expert
        rank = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(routing.order + at + rank - 1, places, mask=mine)
        at += tl.sum(mine.to(tl.int32))
    for start in tl.range(0, tl.cdiv(count, TILE), BLOCK_E):
        i = start + tl.arange(0, BLOCK_E)
        used = i * TILE < count
        at_tile = routing.tiles + (first_tile + i) * 3
        tl.store(at_tile, expert, mask=used)
        tl.store(at_tile + 1, first + i * TILE, mask=used)
        tl.store(at_tile + 2, first + tl.minimum((i + 1) * TILE, count), mask=used)
    if expert == E - 1:
        for start in tl.range(first_tile + tl.cdiv(count, TILE), NUM_TILES, BLOCK_E):
            i = start + tl.arange(0, BLOCK_E)
            tl.store(routing.tiles + i * 3, -1, mask=i < NUM_TILES)


def most_tiles(tokens: int, spec: ExpertsSpec, tile: int) -> int:
    """No choice of experts has more."""
    entries = tokens * spec.top_k
    return min(entries, entries // tile + min(spec.num_experts, entries))


def block_tiles(spec: ExpertsSpec, tile: int) -> int:
    """Enough for `BLOCK_T` tokens, however many there are: one variant of a kernel for all."""
    return 1 << (most_tiles(BLOCK_T.value, spec, tile) - 1).bit_length()


def make_routing(tokens: int, spec: ExpertsSpec, tile: int, device: torch.device) -> Routing:
    """Space for one."""
    empty = partial(torch.empty, dtype=torch.int32, device=device)
    return Routing(
        empty(tokens, spec.top_k),
        empty(tokens, spec.top_k, dtype=torch.float32),
        empty(tokens * spec.top_k),
        empty(most_tiles(tokens, spec, tile), 3),
    )


def route(
    x_TC: Tensor,
    router: Packed,
    bias_E: Tensor | None,
    spec: ExpertsSpec,
    tile: int,
    workspace: Workspace,
    pdl: bool,
    batch_invariant: bool = False,
) -> Routing:
    """Choose, and sort entries into tiles of at most ``tile``."""
    assert router.kind == "dense", "no format quantizes routers"
    tokens, k = x_TC.shape
    entries, routing = tokens * spec.top_k, make_routing(tokens, spec, tile, x_TC.device)
    num_tiles = routing.tiles.shape[0]
    block_e = max(16, triton.next_power_of_2(spec.num_experts))
    block_k = 128
    programs = triton.cdiv(tokens, BLOCK_T.value)
    wanted = 1 if batch_invariant or programs * 8 > SPLIT_K_PROGRAMS else 8
    _, split_k, per_split = plan_split_k(programs, k, 1, block_k, wanted)
    few = tokens <= BLOCK_T.value
    _choose_kernel[(programs, split_k)](
        x_TC, router.tensors[0], bias_E, routing, workspace.counters, workspace.partial,
        tokens, spec.num_experts, x_TC.stride(0), num_tiles, K=k,
        PER_SPLIT=per_split, SPLIT_K=split_k, BLOCK_E=block_e, BLOCK_K=block_k,
        HAS_BIAS=bias_E is not None, TOP_K=spec.top_k,
        BLOCK_CHOICES=triton.next_power_of_2(spec.top_k), RENORMALIZE=spec.renormalize,
        SORT=few, TILE=tile if few else 1, BLOCK_TILES=block_tiles(spec, tile) if few else 1,
        PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    if not few:
        _sort_kernel[(spec.num_experts,)](
            routing, entries, spec.num_experts, num_tiles, tile, BLOCK_E=block_e,
            BLOCK=1024 if entries <= 1024 else 4096, PDL=pdl, num_warps=8, launch_pdl=pdl,
        )  # fmt: skip
    return routing
