"""Tokens out of logits: a program of one instruction, on the threads that run the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from ruvon.errors import LoadError
from ruvon.kernels.cpu.arguments import Sample, SampledRow, SampledToken, record_type
from ruvon.kernels.cpu.graph import Capture, Program
from ruvon.kernels.cpu.layout import aligned_bytes, round_up
from ruvon.kernels.cpu.params import SCRATCH_BYTES, TILE, Param

Records: TypeAlias = np.ndarray[Any, np.dtype[np.void]]

ROW, SAMPLED = record_type(SampledRow), record_type(SampledToken)
MOST_TOKENS = 8 * (SCRATCH_BYTES // 2)
"""The largest vocabulary: the marks of tokens seen before, a bit for each, lie in scratch."""

SPACES_EACH = 4  # workspaces for each thread, so that others can take over what one is late with


class Sampler:
    """Samples tokens for up to ``max_rows`` rows of logits [V] at once, by ``threads`` threads."""

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        threads: int,
        finish: Callable[[Capture], Program],
    ) -> None:
        """Raises LoadError for a vocabulary that is too large."""
        if vocab_size > MOST_TOKENS:
            raise LoadError(f"vocab_size {vocab_size} is more than {MOST_TOKENS}")
        rows = aligned_bytes(max_rows * ROW.itemsize)
        results = aligned_bytes(max_rows * SAMPLED.itemsize)
        self._spaces = SPACES_EACH * threads
        spaces = aligned_bytes(self._spaces * round_up(vocab_size, TILE) * 4)
        arguments = Sample(rows, results, spaces, vocab_size)
        capture = Capture({})
        capture.append(("sample", None), Param.SEQUENCES, arguments, dynamic=True)
        self._rows, self._results = rows.numpy().view(ROW), results.numpy().view(SAMPLED)
        self._program = finish(capture)

    def __call__(self, rows: Records) -> Records:
        """`SAMPLED` for each of some `ROW`. What their addresses point at must be alive meanwhile;
        logits are read in whole vectors of 16."""
        num = len(rows)
        self._rows[:num] = rows
        sizes = dict.fromkeys(Param, 0)
        sizes |= {Param.LOGIT_ROWS: num, Param.SEQUENCES: min(num, self._spaces)}
        self._program.run([*sizes.values()])
        return self._results[:num].copy()
