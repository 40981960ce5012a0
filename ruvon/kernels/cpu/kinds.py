"""The kinds of tiles: how a weight is stored, and what multiplies it."""

from __future__ import annotations

from dataclasses import dataclass

from ruvon.kernels.cpu.simd import LANES

ROWS = 8  # activation rows a tile takes at once: 2 * 8 sums, 8 weights and scales fill 32 registers
GROUP = 32  # values along k that are packed together, with one scale if quantized

# One group of one quantized activation row, in bytes: 32 codes, then four numbers.
BLOCK = 48
SCALE, TOTAL, NEGATED, NEGATED_HALF = 32, 36, 40, 44
"""float32 scale, float32 sum of codes, int32 -128 * sum, int32 -128 * sum of the first sixteen."""

BRAIN_BLOCK = 64  # bytes of a group of a row in bfloat16


@dataclass(frozen=True, slots=True)
class TileKind:
    """How a weight is stored, and which instructions multiply it."""

    storage: str  # "q4", "q8": codes and scales; "f32", "f16", "bf16": as they are
    offsets: bool = False  # q: value = (stored code - zero) * scale + offset
    zero: int = 0  # q: what to take from a stored code: 0 or 8 for q4, 128 for q8
    wide: bool = False  # q: scales and offsets are float32, else float16
    half: bool = False  # q: a scale for each 16 values, not 32
    vnni: bool = False  # q: the CPU has the 8-bit dot product
    pairs: bool = False  # bf16: two k side by side, for the CPU's dot product of bfloat16

    @property
    def quantized(self) -> bool:
        return self.storage.startswith("q")

    @property
    def scale_bytes(self) -> int:
        return LANES * (4 if self.wide else 2)

    @property
    def scales_per_group(self) -> int:
        return 2 if self.half else 1

    @property
    def code_bytes(self) -> int:
        return LANES * GROUP // (2 if self.storage == "q4" else 1)

    @property
    def group_scale_bytes(self) -> int:
        """Bytes of all scales and offsets of one group of a tile."""
        return self.scale_bytes * self.scales_per_group * (2 if self.offsets else 1)

    @property
    def step(self) -> int:
        """How many k one turn of the loop takes: a packed group, or one."""
        return GROUP if self.quantized or self.pairs else 1

    @property
    def step_bytes(self) -> int:
        """Bytes of codes, or of plain values, of a tile for one step."""
        if self.quantized:
            return self.code_bytes
        return LANES * self.step * (4 if self.storage == "f32" else 2)

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row of activations for one step."""
        if self.quantized:
            return BLOCK
        return BRAIN_BLOCK if self.pairs else 4

    def tile_bytes(self, steps: int) -> int:
        """Bytes of a whole tile: the codes of all steps, then their scales, to a cache line."""
        scales = self.group_scale_bytes if self.quantized else 0
        return -(-steps * (self.step_bytes + scales) // 64) * 64


KINDS: tuple[TileKind, ...] = (
    *(
        TileKind(storage, offsets, zero, wide, half, vnni)
        for vnni in (False, True)
        for half in (False, True)
        for wide in (False, True)
        for storage, offsets, zero in (
            ("q4", True, 0),
            ("q4", False, 0),
            ("q4", False, 8),
            ("q8", True, 128),
            ("q8", False, 128),
        )
    ),
    TileKind("f32"),
    TileKind("f16"),
    TileKind("bf16"),
    TileKind("bf16", pairs=True),
)
"""A kernel is told its kind by the index here: an integer is all that a cached kernel may hold."""
