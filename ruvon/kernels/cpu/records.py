"""What the sampling kernel is asked of a row, and what it answers: a tuple each, in memory as
`arguments` are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ruvon.kernels.cpu.arguments import fields
from ruvon.kernels.cpu.params import SCRATCH_BYTES

TILE = 128  # numbers summed up, or represented by their largest, at once
MOST_TOKENS = 8 * (SCRATCH_BYTES // 2)
"""The largest vocabulary: the marks of tokens seen before, a bit for each, lie in scratch."""

BROKEN, INFINITE, NOTHING_LEFT = -1, -2, -3  # in place of a token


class Row(NamedTuple):
    """What is wanted of a row."""

    logits: int  # address of float32 [V]
    temperature: float  # 0 is greedy
    top_k: int  # 0 is off
    min_p: float
    top_p: float  # 1 is off
    seed: np.uint64
    position: int  # in the output
    ids: int  # address of int32 token ids: allowed, banned, biased, seen, counted ones
    amounts: int  # address of float32 amounts to add to biased and counted ones
    num_allowed: int  # -1: all are
    num_banned: int
    num_biased: int
    num_seen: int  # with repetitions
    num_counted: int
    repetition: float  # penalty for those seen
    num_top: int  # how many of the likeliest are wanted; -1: no logprobs at all
    top: int  # address of int32 [num_top]


class Result(NamedTuple):
    """What became of a row."""

    token: int  # or why there is none
    rank: int  # 1 is the likeliest; with logprobs only
    norm: float  # with logprobs only: a logit less this is a log-probability


def record_type(kind: type) -> np.dtype[np.void]:
    """The numpy type of such tuples in memory."""
    names = {float: "f8", np.uint64: "u8"}
    return np.dtype([(name, names.get(each, "i8")) for name, each in fields(kind).items()])


ROW, SAMPLED = record_type(Row), record_type(Result)
