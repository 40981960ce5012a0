"""Tokens out of logits: a program of one instruction, on the team that runs the model."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np

from ruvon.kernels.cpu.layout import aligned_bytes
from ruvon.kernels.cpu.program import SCRATCH_BYTES, Field, Param
from ruvon.kernels.cpu.recorder import Recording
from ruvon.kernels.cpu.tape import Program

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


Records: TypeAlias = np.ndarray[Any, np.dtype[np.void]]

SPACES_EACH = 4  # workspaces for each thread, so that others can take over what one is late with


def record_type(words: type[IntEnum], floats: set[IntEnum], unsigned: set[IntEnum]) -> np.dtype:
    """A numpy type with a field of eight bytes for each word, by its name in lower case."""

    def kind(word: IntEnum) -> str:
        return "f8" if word in floats else "u8" if word in unsigned else "i8"

    return np.dtype([(word.name.lower(), kind(word)) for word in words])


ROW = record_type(Word, {Word.TEMPERATURE, Word.MIN_P, Word.TOP_P, Word.REPETITION}, {Word.SEED})
"""What is wanted of a row: its fields are `Word`."""

DRAWN = record_type(Result, {Result.NORM}, set())
"""What became of it: its fields are `Result`."""


class Drawer:
    """Draws tokens for up to ``max_rows`` rows of logits [V] at once, by ``threads`` threads."""

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        threads: int,
        recording: Recording,
        finish: Callable[[Recording], Program],
    ) -> None:
        """``recording`` is an empty one."""
        assert vocab_size <= MOST_TOKENS
        rows = aligned_bytes(max_rows * ROW.itemsize)
        results = aligned_bytes(max_rows * DRAWN.itemsize)
        self._spaces = SPACES_EACH * threads
        space = -(-vocab_size // TILE) * TILE * 4
        fields = {
            Field.DRAWN: 1,
            Field.X: recording.keep(rows),
            Field.X_STRIDE: ROW.itemsize,
            Field.OUT: recording.keep(results),
            Field.OUT_STRIDE: DRAWN.itemsize,
            Field.TOTAL: recording.keep(aligned_bytes(self._spaces * space)),
            Field.WIDTH: vocab_size,
        }
        recording.append(("draw", None), Param.SEQUENCES, fields)
        self._rows, self._results = rows.numpy().view(ROW), results.numpy().view(DRAWN)
        self._program = finish(recording)

    def __call__(self, rows: Records) -> Records:
        """`DRAWN` for each of some `ROW`. What their addresses point at must be alive meanwhile;
        logits are read in whole vectors of 16."""
        num = len(rows)
        self._rows[:num] = rows
        sizes = dict.fromkeys(Param, 0)
        sizes |= {Param.LOGIT_ROWS: num, Param.SEQUENCES: min(num, self._spaces)}
        self._program.run([*sizes.values()])
        return self._results[:num].copy()
