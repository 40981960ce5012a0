"""How things lie in memory: weights in tiles, activations in packs, keys and values in blocks.

**Weights.** A weight ``[N, K]`` is cut into tiles of 16 rows (N), one behind the other. A tile
holds its codes step by step along k, sixteen rows side by side, then the scales of all groups:

    4 bits   a group of 32 k is 4 x 64 bytes: vector q, lane r, byte j holds row r's codes of
             k = 8q + j (low half) and k = 8q + 4 + j (high half)
    5, 6     the lower four bits as above, then one or two vectors with the others: of vector v,
    bits     those of k = 4q + j are at bit q - 8v, or at bits 2 (q - 4v), of lane r, byte j
    8 bits   a group is 8 x 64 bytes: vector q, lane r, byte j is row r's code of k = 4q + j, + 128
    floats   a group of 4-bit floats as codes of 4 bits; one is multiplied as the integer that
             `formats.CODED` has for it, its scale's exponent less one takes a byte
    dense    each k is 16 numbers; of bfloat16 for the CPU's dot product, each two k are 16 pairs

Where scales are small integers, what multiplies those of eight groups stands behind them all: a
float16 for each row, and another for offsets. N is padded to 32, K to 32, with zeros, so kernels
meet no tails.

**Activations** are packed by 8 rows, in a `Form` of `formats`: quantized, a group of 32 k is
8 x 48 bytes; for pairs, 8 x 32 bfloat16. Dense weights meet plain rows.

**Rows** of plain activations are float32 with a stride of a multiple of 32, zeros behind the end.

**Cache.** Inside a block's head, keys lie by sixteens of tokens as ``[D, 16]`` (a key is a lane of
a score), values by sixteens of dims as ``[P, 16]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ruvon.errors import LoadError
from ruvon.kernels.cpu.formats import FORMATS, GROUP, LANES, VECTORS, TileFormat
from ruvon.kernels.ops import Dense, Mxfp4, Packed, Quantized, Weight

COLUMNS = 32  # outputs of one unit of work: two tiles, one group of the next product's input
PAGE = 4096  # bytes
AT_ONCE = 1024  # rows of a weight that are laid out at once, so that caches hold what is between
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
    if n % rows == 0 and k % columns == 0:
        return x.contiguous()
    return torch.nn.functional.pad(x, (0, -k % columns, 0, -n % rows))


def pack(weight: Weight, dense_dtype: torch.dtype | None, bf16: bool) -> Packed:
    """Lay a weight out in tiles, each part of a stacked one by itself. ``dense_dtype`` converts
    dense weights; None keeps them.

    ``bf16`` says whether the CPU has a dot product of bfloat16.
    """
    if isinstance(weight, Dense):
        return pack_dense(weight.weight_NK, dense_dtype, bf16)
    if isinstance(weight, Quantized):
        return pack_quantized(weight)
    if isinstance(weight, Mxfp4):
        return pack_floats(weight)
    parts = [pack_quantized(part) for part in weight.parts]
    rows = sum(part.shape[0] for part in parts)
    tiles = tuple(tensor for part in parts for tensor in part.tensors)
    return Packed(",".join(part.kind for part in parts), (rows, parts[0].shape[1]), tiles)


def pack_dense(weight_NK: Tensor, dtype: torch.dtype | None, bf16: bool) -> Packed:
    padded = pad(weight_NK if dtype is None else weight_NK.to(dtype), COLUMNS, GROUP)
    n, k = padded.shape
    kind = TileFormat(STORAGES[padded.dtype], pairs=bf16 and padded.dtype == torch.bfloat16)
    memory, packed = new_tiles(kind, weight_NK.shape, n, k)
    words = padded.view(torch.int32) if kind.pairs else padded
    rows = words.unflatten(0, (-1, LANES))  # tile, row, word
    tiles = memory[:, : LANES * k * padded.itemsize].view(words.dtype).unflatten(1, (-1, LANES))
    tiles.copy_(rows.transpose(1, 2))
    return packed


def pack_quantized(weight: Quantized) -> Packed:
    scales, offsets = spread_scales(weight)
    codes = pad(weight.codes_NK, COLUMNS, GROUP)
    n, k = codes.shape
    kind = TileFormat(
        storage=f"q{weight.bits}",
        offsets=offsets is not None,
        zero=128 if weight.bits == 8 else weight.zero,
        scales="two" if weight.blocks is not None else smallest(scales, offsets),
        half=scales.shape[1] > k // GROUP,
    )
    memory, packed = new_tiles(kind, weight.codes_NK.shape, n, k)
    sizes = [k // GROUP * kind.step_bytes, k // GROUP * kind.group_scale_bytes]
    for_codes, for_scales, rest = memory.tensor_split([sizes[0], sum(sizes)], dim=1)
    for part, place in zip(codes.split(AT_ONCE), for_codes.split(AT_ONCE // LANES), strict=True):
        write_codes(part, place, kind)
    write_scales(scales, offsets, for_scales, kind)
    if weight.blocks is not None:
        blocks = pad(weight.blocks.flatten(1), COLUMNS, 1).view(torch.int16)
        blocks = blocks.unflatten(0, (-1, LANES)).transpose(1, 2)
        rest[:, : blocks[0].numel() * 2].view(torch.int16).view(blocks.shape).copy_(blocks)
    return packed


def pack_floats(weight: Mxfp4) -> Packed:
    """Of each eight nibbles in a word, the first four go to lower halves, the others to upper."""
    n, groups, _ = weight.codes_NKB.shape
    kind = TileFormat("e2m1", zero=16, scales="e8m0")
    memory, packed = new_tiles(kind, (n, groups * GROUP), round_up(n, COLUMNS), groups * GROUP)
    for_codes, for_scales, _ = memory.tensor_split(
        [groups * kind.step_bytes, groups * (kind.step_bytes + kind.group_scale_bytes)], dim=1
    )
    parts = (x.split(AT_ONCE) for x in (weight.codes_NKB.flatten(1), weight.scales_NK))
    places = (x.split(AT_ONCE // LANES) for x in (for_codes, for_scales))
    for codes, scales, code_place, scale_place in zip(*parts, *places, strict=True):
        words = pad(codes, COLUMNS, 1).clone().view(torch.int32)  # where it lies may be odd
        swap_bits(words, 8, 0x0000FF00)
        swap_bits(words, 4, 0x00F000F0)
        words = words.unflatten(0, (-1, LANES)).transpose(1, 2)
        code_place.view(torch.int32).unflatten(1, (-1, LANES)).copy_(words)
        exponents = pad(scales, COLUMNS, 1).clamp(min=1).sub_(1)
        exponents = exponents.unflatten(0, (-1, LANES)).transpose(1, 2)
        scale_place.unflatten(1, (-1, LANES)).copy_(exponents)
    return packed


def swap_bits(words: Tensor, apart: int, mask: int) -> None:
    """Swap in place the bits of ``mask`` with those that are ``apart`` places above them."""
    moved = (words ^ (words >> apart)) & mask
    words ^= moved
    words ^= moved << apart


def smallest(*tables: Tensor | None) -> Literal["f16", "f32"]:
    """The type that holds these numbers exactly."""
    fit = (
        table.dtype == torch.float16 or torch.equal(table.half().float(), table)
        for table in tables
        if table is not None
    )
    return "f16" if all(fit) else "f32"


def new_tiles(kind: TileFormat, shape: Sequence[int], n: int, k: int) -> tuple[Tensor, Packed]:
    """Memory for a weight of padded size n, k: uint8 [tiles, bytes of a tile]."""
    count, size = n // LANES, kind.tile_bytes(k // kind.step)
    memory = aligned_bytes(count * size).view(count, size)
    return memory, Packed(str(FORMATS.index(kind)), (shape[0], shape[1]), (memory,))


def spread_scales(weight: Quantized) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets for each 32 values (each 16 if the weight's groups need it), padded like
    the weight. Those of larger groups are repeated."""
    k, group = weight.codes_NK.shape[1], weight.group
    unit = GROUP if group % GROUP == 0 or group >= k else GROUP // 2
    if group % unit and group < k:
        raise LoadError(f"groups of {group} values cannot be laid out for the CPU kernels")
    columns = round_up(k, GROUP) // unit

    def spread(table: Tensor) -> Tensor:
        if group > unit:
            table = table.repeat_interleave(-(-group // unit), dim=1)[:, :columns]
        padding = (0, columns - table.shape[1], 0, -table.shape[0] % COLUMNS)
        return torch.nn.functional.pad(table, padding) if any(padding) else table

    return spread(weight.scales), None if weight.offsets is None else spread(weight.offsets)


def write_codes(codes_NK: Tensor, memory: Tensor, kind: TileFormat) -> None:
    """Four codes along k, in one 32-bit word, stay together all the way."""
    words = codes_NK.view(torch.int32).unflatten(0, (-1, LANES))  # tile, row, word
    if kind.bits == 8:
        words = words ^ int(np.array(0x80808080, np.uint32).view(np.int32))
    else:
        words = split_codes(words.unflatten(2, (-1, VECTORS)), kind.bits - 4).flatten(2)
    memory.view(torch.int32).unflatten(1, (-1, LANES)).copy_(words.transpose(1, 2))


def split_codes(words: Tensor, extra: int) -> Tensor:
    """Eight words of codes of 4 and ``extra`` bits [..., 8] as four of lower halves, side by side,
    and as many as there are extra bits."""
    low, high = (words & 0x0F0F0F0F).unflatten(-1, (-1, 2)).unbind(-1)
    planes = [low | (high << 4)]
    if extra:
        more = ((words >> 4) & 0x0F0F0F0F).unflatten(-1, (extra, -1))
        shifts = torch.arange(0, 8, extra, dtype=torch.int32)
        planes.append((more << shifts).sum(-1, dtype=torch.int32))
    return torch.cat(planes, dim=-1)


def write_scales(scales: Tensor, offsets: Tensor | None, memory: Tensor, kind: TileFormat) -> None:
    """For each group of a tile its scales, then its offsets."""
    tables = [scales] if offsets is None else [scales, offsets]
    dtype = {"f16": torch.float16, "f32": torch.float32, "two": torch.int8}[kind.scales]
    x = torch.stack([table.unflatten(0, (-1, LANES)) for table in tables], dim=-1)
    x = x.unflatten(2, (-1, kind.scales_per_group)).permute(0, 2, 4, 3, 1)  # ..., table, part, row
    memory.view(dtype).view(x.shape).copy_(x)


def parts_of(weight: Packed) -> list[tuple[int, Tensor]]:
    """The kind, as an index of `FORMATS`, and the tiles of each of its parts."""
    return [*zip(map(int, weight.kind.split(",")), weight.tensors, strict=True)]
