"""What is asked of the kernel that draws tokens, and what it answers: a row's parameters and
results, word by word."""

from __future__ import annotations

from enum import IntEnum

from ruvon.kernels.cpu.program import SCRATCH_BYTES

TILE = 128  # numbers summed up, or represented by their largest, at once
MOST_TOKENS = 8 * (SCRATCH_BYTES // 2)
"""The largest vocabulary: the marks of tokens seen before, a bit for each, lie in scratch."""

BROKEN, INFINITE, NOTHING_LEFT = -1, -2, -3  # in place of a token


class Word(IntEnum):
    """Index of an int64, or a float64 where said, in a row's parameters."""

    LOGITS = 0  # address of float32 [V]
    TEMPERATURE = 1  # float64; 0 is greedy
    TOP_K = 2  # 0 is off
    MIN_P = 3  # float64
    TOP_P = 4  # float64; 1 is off
    SEED = 5
    POSITION = 6  # in the output
    IDS = 7  # address of int32 token ids: allowed, banned, biased, seen, counted ones
    AMOUNTS = 8  # address of float32 amounts to add to biased and counted ones
    NUM_ALLOWED = 9  # -1: all are
    NUM_BANNED = 10
    NUM_BIASED = 11
    NUM_SEEN = 12  # with repetitions
    NUM_COUNTED = 13
    REPETITION = 14  # float64, for those seen
    NUM_TOP = 15  # how many of the likeliest are wanted; -1: no logprobs at all
    TOP = 16  # address of int32 [NUM_TOP]


class Result(IntEnum):
    """Index of an int64, or a float64 where said, in what is told of a row."""

    TOKEN = 0
    RANK = 1  # 1 is the likeliest; with logprobs only
    NORM = 2  # float64, with logprobs only: a logit less this is a log-probability
