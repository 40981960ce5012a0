"""How things lie in memory: weights in tiles, activations in packs, keys and values in blocks.

**Weights.** A weight ``[N, K]`` is cut into tiles of 16 rows (N), one behind the other. A tile
holds its codes step by step along k, sixteen rows side by side, then the scales of all groups:

    4 bits   a group of 32 k is 4 x 64 bytes: vector q, lane r, byte j holds row r's codes of
             k = 8q + j (low half) and k = 8q + 4 + j (high half)
    8 bits   a group is 8 x 64 bytes: vector q, lane r, byte j is row r's code of k = 4q + j, + 128
    dense    each k is 16 numbers

N is padded to 32, K to 32, with zeros, so kernels meet no tails.

**Activations** are packed by 8 rows: quantized, a group of 32 k is 8 x 48 bytes (see `tiles`);
dense, each k is 8 floats.

**Rows** of plain activations are float32 with a stride of a multiple of 32, zeros behind the end.

**Cache.** Inside a block's head, keys lie by sixteens of tokens as ``[D, 16]`` (a key is a lane of
a score), values by sixteens of dims as ``[P, 16]``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ruvon.kernels.cpu.tiles import GROUP, KINDS, LANES, TileKind
from ruvon.kernels.ops import Dense, Packed, Quantized, Weight

COLUMNS = 32  # outputs of one unit of work: two tiles, one group of the next product's input
PAGE = 4096  # bytes
STORAGES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def aligned_bytes(count: int) -> Tensor:
    """Zeroed uint8 memory that starts on a page, so that vectors do not straddle cache lines, and
    may be read a vector's width past its end. Takes no memory before it is written to."""
    raw = np.zeros(count + PAGE + 64, dtype=np.uint8)
    start = -raw.ctypes.data % PAGE
    return torch.from_numpy(raw[start : start + count])


def pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros below and right, up to multiples of ``rows`` and ``columns``."""
    n, k = x.shape
    return torch.nn.functional.pad(x, (0, round_up(k, columns) - k, 0, round_up(n, rows) - n))


def pack(weight: Weight, dense_dtype: torch.dtype | None, vnni: bool) -> Packed:
    """Lay a weight out in tiles. ``dense_dtype`` converts dense weights; None keeps them."""
    if isinstance(weight, Dense):
        return pack_dense(weight.weight_NK, dense_dtype)
    return pack_quantized(weight, vnni)


def pack_dense(weight_NK: Tensor, dtype: torch.dtype | None) -> Packed:
    padded = pad(weight_NK if dtype is None else weight_NK.to(dtype), COLUMNS, GROUP)
    kind = TileKind(STORAGES[padded.dtype])
    tiles = padded.view(padded.shape[0] // LANES, LANES, -1).transpose(1, 2).contiguous()
    return packed(kind, weight_NK.shape, tiles.view(torch.uint8).flatten(1))


def pack_quantized(weight: Quantized, vnni: bool) -> Packed:
    scales, offsets = regroup(weight)
    zero = 128 if weight.bits == 8 else 0
    if zero == 0 and offsets is not None and torch.equal(offsets, -8 * scales):
        zero, offsets = 8, None
    tables = scales if offsets is None else torch.cat((scales, offsets))
    wide = not torch.equal(tables.half().float(), tables)
    half = scales.shape[1] * GROUP > round_up(weight.codes_NK.shape[1], GROUP)
    storage = "q4" if weight.bits == 4 else "q8"
    kind = TileKind(storage, offsets is not None, zero, wide, half, vnni)
    parts = [tile_codes(weight, kind), tile_scales(scales, offsets, kind)]
    return packed(kind, weight.codes_NK.shape, torch.cat(parts, dim=1))


def packed(kind: TileKind, shape: torch.Size, tiles: Tensor) -> Packed:
    """``tiles`` [number, bytes of each] into aligned memory, each padded to a cache line."""
    count, used = tiles.shape
    size = round_up(used, 64)
    memory = aligned_bytes(count * size).view(count, size)
    memory[:, :used] = tiles
    return Packed(str(KINDS.index(kind)), (shape[0], shape[1]), (memory,))


def regroup(weight: Quantized) -> tuple[Tensor, Tensor | None]:
    """float32 scales and offsets for each 32 values (each 16 if the weight's groups need it),
    padded like the weight. Larger groups are repeated; K ends inside a group at most once."""
    unit = GROUP if weight.group % GROUP == 0 or weight.group >= weight.codes_NK.shape[1] else 16
    if weight.group % unit and weight.group < weight.codes_NK.shape[1]:
        raise ValueError(f"groups of {weight.group} values cannot be laid out in tiles")
    columns = round_up(weight.codes_NK.shape[1], GROUP) // unit

    def spread(table: Tensor | None) -> Tensor | None:
        if table is None:
            return None
        wide = table.float().repeat_interleave(-(-weight.group // unit), dim=1)[:, :columns]
        n = wide.shape[0]
        below, right = round_up(n, COLUMNS) - n, columns - wide.shape[1]
        return torch.nn.functional.pad(wide, (0, right, 0, below))

    scales = spread(weight.scales)
    assert scales is not None
    return scales, spread(weight.offsets)


def tile_codes(weight: Quantized, kind: TileKind) -> Tensor:
    """uint8 [tiles, bytes of codes]."""
    codes = pad(weight.codes_NK, COLUMNS, GROUP)
    if kind.storage == "q4":
        x = codes.view(torch.uint8).view(-1, LANES, codes.shape[1] // GROUP, 4, 2, 4)
        joined = x[..., 0, :] | (x[..., 1, :] << 4)  # tile, row, group, q, j
        return joined.permute(0, 2, 3, 1, 4).reshape(codes.shape[0] // LANES, -1)
    biased = codes.view(torch.uint8) ^ 0x80
    x = biased.view(-1, LANES, codes.shape[1] // GROUP, 8, 4)
    return x.permute(0, 2, 3, 1, 4).reshape(codes.shape[0] // LANES, -1)


def tile_scales(scales: Tensor, offsets: Tensor | None, kind: TileKind) -> Tensor:
    """uint8 [tiles, bytes of scales]: for each group its scales, then its offsets."""
    tables = [scales] if offsets is None else [scales, offsets]
    dtype = torch.float32 if kind.wide else torch.float16
    per_group = [
        table.to(dtype).view(scales.shape[0] // LANES, LANES, -1, kind.scales_per_group)
        for table in tables
    ]
    x = torch.stack(per_group, dim=-1)  # tile, row, group, part, table
    return x.permute(0, 2, 4, 3, 1).contiguous().view(torch.uint8).flatten(1)


def kind_of(weight: Packed) -> TileKind:
    return KINDS[int(weight.kind)]
