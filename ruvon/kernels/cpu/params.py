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

SCRATCH_BYTES = 1 << 18  # a thread's own, with its notes at the end
NOTES = 128


class Note(IntEnum):
    """Where in its scratch space a thread notes what it knows of an instruction and the next."""

    OWN_END = SCRATCH_BYTES - NOTES  # the unit behind its own last one in this instruction
    FETCH_FOR = OWN_END + 8  # whose weights it fetches next: where they begin
    FETCH_AT = OWN_END + 16  # which of them come next,
    FETCH_END = OWN_END + 24  # and up to where
    CACHE_FOR = OWN_END + 32  # which attention it fetches keys and values for
    CACHE_SEQUENCE = OWN_END + 40  # the sequence it is at,
    CACHE_TURN = OWN_END + 48  # and how far down its next one is
    CACHE_BLOCK = OWN_END + 56
    CACHE_INSIDE = OWN_END + 64  # the place in a block's keys and values
    CACHE_LEFT = OWN_END + 72  # how many bytes more it may fetch
    OFFERED = OWN_END + 80  # when it last offered its core
    CLOCK = OWN_END + 88  # what the clock says, in two words
