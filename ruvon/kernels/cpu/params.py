"""Numbers that graphs, threads and compiled kernels share."""

from __future__ import annotations

from enum import IntEnum
from typing import get_args

from ruvon.kernels.ops import Activation


class Param(IntEnum):
    """Index of an int64 in params: what differs from step to step, see `graph.sizes_of`."""

    TOKENS = 0
    TOKEN_PANELS = 1  # panels of `PANEL` activation rows: behind what counts the rows
    LOGIT_ROWS = 2
    LOGIT_PANELS = 3
    SEQUENCES = 4
    QUERY_TILES = 5  # of `QUERY_TOKENS` tokens of one sequence
    ONE = 6  # what is there once


PANEL = 128  # rows that stay in a cache while weights stream by: 128 x 1536 int8 is 0.3 MB

ACTIVATIONS = {name: number for number, name in enumerate(get_args(Activation))}
NONE, GELU_TANH, GELU, RELU, SILU, SILU_GATED, GELU_TANH_GATED = (
    ACTIVATIONS[name]
    for name in ("none", "gelu_tanh", "gelu", "relu", "silu", "silu_gated", "gelu_tanh_gated")
)

# Of experts: some rows of one of them are a panel. Of each is noted, as int64, which expert, its
# first row, how many rows, and what a column of all panels before it costs.
PANELS_AT, PANEL_BYTES = 16, 32
WEIGHTS_COST = 3  # rows that take as long as the weights that they meet take to arrive

# What attention can do
QUERY_TOKENS = 16
TILE_ROWS = 64  # most rows (tokens times heads) of a query tile
MOST_DIMS = 256

# Sampling
TILE = 128  # numbers summed up, or represented by their largest, at once
BROKEN, INFINITE, NOTHING_LEFT = -1, -2, -3  # in place of a token

# A thread's scratch space, and its own notes at the end of it.
SCRATCH_BYTES = 1 << 18
NOTES = 128
FETCH_AT, FETCH_END, FETCH_FOR, OWN_END, OFFERED, CLOCK = (
    SCRATCH_BYTES - NOTES + 8 * n for n in range(6)
)
"""Which weights it will fetch next and up to where; whose they are; the unit behind its own last
one in this instruction; when it last offered its core, and what the clock says (two words)."""
CACHE_FOR, CACHE_SEQUENCE, CACHE_TURN, CACHE_BLOCK, CACHE_INSIDE, CACHE_LEFT = (
    SCRATCH_BYTES - NOTES + 64 + 8 * n for n in range(6)
)
"""Which attention it fetches keys and values for; the sequence it is at, and how far down its next
one is; the block and the place in its keys and values; how many bytes more it may fetch."""
