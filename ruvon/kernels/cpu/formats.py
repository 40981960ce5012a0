"""Tile formats: how a weight is stored, and how the activations that it meets are packed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

LANES = 16  # rows of weight in a tile, floats in a vector of the kernels
ROWS = 8  # rows of activations that are packed together
GROUP = 32  # values along k that are packed together, with one scale if quantized
VECTORS = 8  # of four codes a lane, in a group

CODED = tuple(16 + sign * twice for sign in (1, -1) for twice in (0, 1, 2, 3, 4, 6, 8, 12))
"""Twice the value of each 4-bit float, 16 added so that none is negative."""
CODED_BITS = 5  # of these

SUPER = 8  # groups whose scales are small integers that one number multiplies


class Form(Enum):
    """How rows of activations lie in memory: plain, or packed as a product wants them."""

    ROWS = "plain float32"
    INT8 = "a group is 32 codes of 8 bits, then what `SCALE` and the like say"
    BF16 = "a group is 32 numbers"

    @property
    def group_bytes(self) -> int:
        """Of one row's group."""
        return {Form.INT8: 48, Form.BF16: 64}.get(self, 128)


SCALE, TOTAL, HALVES = 32, 36, 40
"""Where four float32 stand in a quantized group, behind its codes: their scale, their sum, and the
sums of the first sixteen and of the others."""


@dataclass(frozen=True, slots=True)
class TileFormat:
    """How a weight is stored."""

    storage: str  # "f32", "f16", "bf16", or codes: "q4", "q5", "q6", "q8", "e2m1"
    offsets: bool = False  # q: value = (stored code - zero) * scale + offset
    zero: int = 0  # q: what to take from a stored code
    scales: Literal["f16", "f32", "two", "e8m0"] = "f16"
    """q: "two" is int8, times a float16; "e8m0" is a power of two, the exponent less one."""
    half: bool = False  # q: a scale for each 16 values, not 32
    pairs: bool = False  # bf16: two k side by side, for the CPU's dot product of bfloat16

    @property
    def form(self) -> Form:
        """How a product with such weights wants its activations packed."""
        if self.pairs:
            return Form.BF16
        return Form.INT8 if self.quantized else Form.ROWS

    @property
    def quantized(self) -> bool:
        return self.storage[0] in "qe"

    @property
    def floats(self) -> bool:
        """Whether codes are 4-bit floats: one stands for an integer, see `CODED`."""
        return self.storage == "e2m1"

    @property
    def bits(self) -> int:
        """Of a code, or of a plain value, in memory."""
        return 4 if self.floats else int(self.storage.strip("qbf"))

    @property
    def scales_per_group(self) -> int:
        return 2 if self.half else 1

    @property
    def tables(self) -> int:
        """Vectors of scales and of offsets in a group."""
        return self.scales_per_group * (2 if self.offsets else 1)

    @property
    def table_bytes(self) -> int:
        """Of one such vector."""
        return LANES * {"f16": 2, "f32": 4, "two": 1, "e8m0": 1}[self.scales]

    @property
    def group_scale_bytes(self) -> int:
        """Bytes of all scales and offsets of one group of a tile."""
        return self.table_bytes * self.tables if self.quantized else 0

    @property
    def step(self) -> int:
        """How many k one turn of the loop takes: a packed group, or one."""
        return GROUP if self.quantized or self.pairs else 1

    @property
    def step_bytes(self) -> int:
        """Bytes of codes, or of plain values, of a tile for one step."""
        return LANES * self.step * self.bits // 8

    @property
    def super_bytes(self) -> int:
        """Bytes of what multiplies the scales, and the offsets, of `SUPER` groups of a tile."""
        return 2 * LANES * (2 if self.offsets else 1) if self.scales == "two" else 0

    def tile_bytes(self, steps: int) -> int:
        """Bytes of a whole tile: the codes of all steps, then their scales, to a cache line."""
        size = steps * (self.step_bytes + self.group_scale_bytes)
        return -(-(size + -(-steps // SUPER) * self.super_bytes) // 64) * 64


FORMATS: tuple[TileFormat, ...] = (
    *(
        TileFormat(storage, offsets, zero, scales, half)
        for half in (False, True)
        for scales in ("f16", "f32")
        for storage, offsets, zero in (
            ("q4", True, 0),
            ("q4", False, 0),
            ("q4", False, 8),
            ("q8", True, 128),
            ("q8", False, 128),
        )
    ),
    TileFormat("q5", offsets=True),
    TileFormat("q5", zero=16),
    TileFormat("q4", offsets=True, scales="two"),
    TileFormat("q5", offsets=True, scales="two"),
    TileFormat("q6", zero=32, scales="two", half=True),
    TileFormat("e2m1", zero=16, scales="e8m0"),
    TileFormat("f32"),
    TileFormat("f16"),
    TileFormat("bf16"),
    TileFormat("bf16", pairs=True),
)
"""A kernel is told its format by the index here."""

F16_CACHE = FORMATS.index(TileFormat("f16"))
"""How keys and values are stored unless something else is asked for."""
