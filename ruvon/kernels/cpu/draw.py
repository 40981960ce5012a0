"""Tokens out of logits: a program of one instruction, on the team that runs the model."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np

from ruvon.kernels.cpu.layout import aligned_bytes
from ruvon.kernels.cpu.program import Field, Param
from ruvon.kernels.cpu.recorder import Recording
from ruvon.kernels.cpu.sampling import MOST_TOKENS, TILE, Result, Word
from ruvon.kernels.cpu.tape import Program

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
