"""What an instruction is: fields by name, the same names for every kernel.

A *program* is an array of instructions, each 384 bytes of int64 fields: addresses, sizes, a
float64 here and there. A kernel is a compiled function over addresses:

    kernel(instruction, params, start, stop, scratch)

It does units ``start`` to ``stop`` of its instruction; what a unit is (a row, 32 outputs of a
product, a head) is the kernel's own business. How many there are: the number at ``params +
COUNT`` times ``PER_COUNT``, so that one program serves every batch size. An optional input or
output that is absent has address 0.
"""

from __future__ import annotations

from enum import IntEnum

INSTRUCTION_BYTES = 384


class Field(IntEnum):
    """Index of an int64 in an instruction."""

    KERNEL = 0  # address of the compiled kernel
    COUNT = 1  # where in params the number of rows (or what is counted) stands
    PER_COUNT = 2  # units for each of them
    DRAWN = 3  # 1: units cost so unlike that threads draw them one by one; 0: each has its own

    X = 4  # float32 rows in, or packed activations
    X_STRIDE = 5  # bytes; all strides are
    Y = 6  # a second input of the same shape
    OUT = 7  # float32 rows out
    OUT_STRIDE = 8
    INT8 = 9  # packed rows out, quantized
    GROUPS = 10  # groups of 32 in a packed row
    TOTAL = 11  # x + residual out
    WIDTH = 12  # numbers in a row that are not padding
    WEIGHT = 13
    BIAS = 14
    EPS = 15  # float64
    ACTIVATION = 16
    IDS = 17  # int32: token ids, positions or row numbers
    STEPS = 18  # turns along k of a tile
    TILE_BYTES = 19
    GATE_BYTES = 20  # from a gate's tile to its partner's; 0 if the product is not gated

    KEYS = 21  # the layer's cache
    VALUES = 22
    HEADS = 23
    KV_HEADS = 24
    HEAD_DIM = 25
    PAGE = 26  # tokens in a block
    SLOTS = 27  # int32
    STARTS = 28  # int32: first token of each sequence
    CONTEXTS = 29  # int32
    TABLES = 30  # int32
    TABLE_STRIDE = 31
    COS = 32  # float32 [positions, ROTATED]
    SIN = 33
    ROTATED = 34  # pairs of dims that rotate
    Q_NORM = 35
    K_NORM = 36
    SCALE = 37  # float64
    WINDOW = 38
    SINKS = 39

    NEXT = 40  # the tiles of the next product, to be fetched into the cache ahead of time
    NEXT_UNITS = 41
    NEXT_UNIT_BYTES = 42

    BF16 = 43  # packed rows out, bfloat16
    INT16 = 44  # packed rows out, quantized, in 16 bits


class Param(IntEnum):
    """Index of an int64 in params: what differs from step to step."""

    TOKENS = 0
    TOKEN_PANELS = 1  # panels of `PANEL` activation rows
    LOGIT_ROWS = 2
    LOGIT_PANELS = 3
    SEQUENCES = 4
    QUERY_TILES = 5  # of `QUERY_TOKENS` tokens of one sequence


PANEL = 128  # rows that stay in a cache while weights stream by: 128 x 1536 int8 is 0.3 MB

NONE, GELU_TANH, GELU, RELU, SILU, SILU_GATED = range(6)
ACTIVATIONS = {
    "none": NONE,
    "gelu_tanh": GELU_TANH,
    "gelu": GELU,
    "relu": RELU,
    "silu": SILU,
    "silu_gated": SILU_GATED,
}

# What attention can do
QUERY_TOKENS = 16
TILE_ROWS = 64  # most rows (tokens times heads) of a query tile
MOST_DIMS = 256

# A thread's scratch space, and its own notes at the end of it.
SCRATCH_BYTES = 1 << 18
FETCH_AT, FETCH_END, FETCH_FOR, OWN_END, OFFERED, CLOCK = (
    SCRATCH_BYTES - 64 + 8 * n for n in range(6)
)
"""Which weights it will fetch next and up to where; whose they are; the unit behind its own last
one in this instruction; when it last offered its core, and what the clock says."""
