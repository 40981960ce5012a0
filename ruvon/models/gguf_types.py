"""How llama.cpp packs numbers into blocks, and the same numbers as `Quantized` or `Mxfp4`, exactly.

A row of K weights is K / values blocks of ``bytes`` bytes each. Unpackers get all blocks of a
matrix, ``raw_NBX`` uint8 [N, blocks, bytes], and take fields by position. In 32-blocks the first
16 bytes of codes hold weights 0 to 15 in their low halves and 16 to 31 in their high halves. The
K-quants' 256-blocks have a scale (and minimum) for each 32 or 16 weights, of 6 or 8 bits, times a
float16 for the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ruvon.kernels.ops import Mxfp4, Quantized

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.floating]

AT_ONCE = 256  # rows
DENSE: Mapping[int, torch.dtype] = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """One block format."""

    name: str
    values: int
    bytes: int
    unpack: Callable[[Bytes], Quantized | Mxfp4]


def _field(raw_NBX: Bytes, at: int, kind: str) -> NDArray[Any]:
    """The value at byte ``at`` of each block, [N, B]."""
    size = raw_NBX.shape[-1]
    block = np.dtype({"names": ["x"], "formats": [kind], "offsets": [at], "itemsize": size})
    return np.ascontiguousarray(raw_NBX.view(block)["x"][..., 0])


def _bytes(raw_NBX: Bytes, at: int, count: int) -> Bytes:
    """``count`` bytes of each block, [N, B, count]: to numpy one item each, for it takes several
    times as long over a few bytes at a time."""
    return _field(raw_NBX, at, f"V{count}")[..., None].view(np.uint8)


def _halves(raw_NBX: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of each block, [N, B]."""
    return _field(raw_NBX, at, "<f2")


def _nibbles(packed: Bytes) -> Bytes:
    """[..., X] bytes to [..., 2 X] codes: all low halves, then all high ones."""
    size = packed.shape[-1]
    codes = np.empty((*packed.shape[:-1], 2 * size), np.uint8)
    halves = codes.view(f"V{size}")  # one item each, as in `_bytes`
    halves[..., :1] = (packed & 15).view(f"V{size}")
    halves[..., 1:] = (packed >> 4).view(f"V{size}")
    return codes


def _fifth_bits(raw_NBX: Bytes, at: int) -> Bytes:
    """Bit ``i`` of the four bytes at ``at`` is weight ``i``'s, moved to where it counts 16."""
    bits: Bytes = np.unpackbits(raw_NBX[..., at : at + 4], axis=-1, bitorder="little")
    return bits << np.uint8(4)


def _quantized(
    codes: NDArray[Any],
    scales: NDArray[Any],
    bits: Literal[4, 5, 6, 8],
    offsets: NDArray[Any] | None = None,
    **more: Any,
) -> Quantized:
    """Codes with any inner dimensions, scales of one per group, both [N, ...]."""
    n = codes.shape[0]
    codes_NK, scales = codes.reshape(n, -1).view(np.int8), scales.reshape(n, -1)
    return Quantized(
        codes_NK=torch.from_numpy(codes_NK),
        scales=torch.from_numpy(np.ascontiguousarray(scales)),
        offsets=None if offsets is None else torch.from_numpy(offsets.reshape(n, -1).copy()),
        group=codes_NK.shape[1] // scales.shape[1],
        bits=bits,
        **more,
    )


def _q4_0(raw: Bytes) -> Quantized:
    return _quantized(_nibbles(_bytes(raw, 2, 16)), _halves(raw, 0), 4, zero=8)


def _q4_1(raw: Bytes) -> Quantized:
    return _quantized(_nibbles(_bytes(raw, 4, 16)), _halves(raw, 0), 4, _halves(raw, 2))


def _q5_0(raw: Bytes) -> Quantized:
    codes = _nibbles(_bytes(raw, 6, 16)) | _fifth_bits(raw, 2)
    return _quantized(codes, _halves(raw, 0), 5, zero=16)


def _q5_1(raw: Bytes) -> Quantized:
    codes = _nibbles(_bytes(raw, 8, 16)) | _fifth_bits(raw, 4)
    return _quantized(codes, _halves(raw, 0), 5, _halves(raw, 2))


def _q8_0(raw: Bytes) -> Quantized:
    return _quantized(_bytes(raw, 2, 32), _halves(raw, 0), 8)


def _six_bit_scales(raw_NBX: Bytes) -> dict[str, Any]:
    """Eight scales and eight minimums of six bits out of bytes 4 to 15, int8 [N, B, 8] each, and
    what multiplies them.

    Four bytes of scales, four of minimums, each with the last four's upper two bits on top of the
    first four's six, then four bytes with the last four's lower halves, scale below minimum.
    """
    first, second, both = (raw_NBX[..., at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate((first & 63, (both & 15) | ((first >> 6) << 4)), axis=-1)
    minimums = np.concatenate((second & 63, (both >> 4) | ((second >> 6) << 4)), axis=-1)
    blocks = np.stack((_halves(raw_NBX, 0), -_halves(raw_NBX, 2)), axis=-1)
    return {
        "scales": scales.view(np.int8),
        "offsets": minimums.view(np.int8),
        "blocks": torch.from_numpy(blocks),
    }


def _q4_k(raw: Bytes) -> Quantized:
    packed = _bytes(raw, 16, 128).reshape(*raw.shape[:2], 4, 32)  # 64 weights a row
    return _quantized(_nibbles(packed), bits=4, **_six_bit_scales(raw))


def _q5_k(raw: Bytes) -> Quantized:
    packed = _bytes(raw, 48, 128).reshape(*raw.shape[:2], 4, 32)
    low = _nibbles(packed).reshape(*raw.shape[:2], 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]  # bit g of byte i belongs to weight 32 g + i
    high = (raw[..., None, 16:48] >> shifts) & 1
    return _quantized(low | (high << 4), bits=5, **_six_bit_scales(raw))


def _q6_k(raw: Bytes) -> Quantized:
    packed = _bytes(raw, 0, 128).reshape(*raw.shape[:2], 2, 64)  # 128 weights a row
    low = _nibbles(packed).reshape(*raw.shape[:2], 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (raw[..., 128:192].reshape(*raw.shape[:2], 2, 1, 32) >> shifts) & 3
    scales = np.ascontiguousarray(raw[..., 192:208]).view(np.int8)
    blocks = torch.from_numpy(_halves(raw, 208)[..., None])
    return _quantized(low | (high << 4), scales, 6, zero=32, blocks=blocks)


def _mxfp4(raw: Bytes) -> Mxfp4:
    """The scale, then codes whose neighbours in a byte are half a block apart; in `Mxfp4` they are
    neighbours in the block. Some rows at once, so that caches hold what is between."""
    codes = np.empty((*raw.shape[:2], 16), np.uint8)
    halves = codes.view("V8")  # one item each, as in `_bytes`
    for start in range(0, len(raw), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        pairs = _bytes(raw[rows], 1, 16).view("<u2")
        for number, apart in enumerate((pairs & 0x0F0F, pairs >> 4 & 0x0F0F)):
            together = (apart | apart >> 4).astype(np.uint8)
            halves[rows, :, number : number + 1] = together.view("V8")
    return Mxfp4(torch.from_numpy(codes), torch.from_numpy(_field(raw, 0, "u1")))


QUANTIZED: Mapping[int, BlockFormat] = {
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, _q4_1),
    6: BlockFormat("Q5_0", 32, 22, _q5_0),
    7: BlockFormat("Q5_1", 32, 24, _q5_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    12: BlockFormat("Q4_K", 256, 144, _q4_k),
    13: BlockFormat("Q5_K", 256, 176, _q5_k),
    14: BlockFormat("Q6_K", 256, 210, _q6_k),
    39: BlockFormat("MXFP4", 32, 17, _mxfp4),
}

TYPE_NAMES: Mapping[int, str] = {
    0: "F32", 1: "F16", 30: "BF16", **{kind: layout.name for kind, layout in QUANTIZED.items()},
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
}  # fmt: skip
