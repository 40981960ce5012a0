"""Tokens out of logits: a program of one instruction, on the threads that run the model.

What is asked of its kernel, and what it answers, is a tuple a row, in memory as `arguments` are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from torch import Tensor

from ruvon.kernels.cpu.arguments import Sample, fields
from ruvon.kernels.cpu.capture import Capture
from ruvon.kernels.cpu.graph import Program
from ruvon.kernels.cpu.layout import aligned_bytes, round_up
from ruvon.kernels.cpu.params import SCRATCH_BYTES, Param

Records: TypeAlias = np.ndarray[Any, np.dtype[np.void]]

TILE = 128  # numbers summed up, or represented by their largest, at once
MOST_TOKENS = 8 * (SCRATCH_BYTES // 2)
"""The largest vocabulary: the marks of tokens seen before, a bit for each, lie in scratch."""

BROKEN, INFINITE, NOTHING_LEFT = -1, -2, -3  # in place of a token
SPACES_EACH = 4  # workspaces for each thread, so that others can take over what one is late with


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


class Sampler:
    """Samples tokens for up to ``max_rows`` rows of logits [V] at once, by ``threads`` threads."""

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        threads: int,
        capture: Capture,
        finish: Callable[[Capture, Iterable[Tensor]], Program],
    ) -> None:
        """``capture`` is an empty one."""
        assert vocab_size <= MOST_TOKENS
        rows = aligned_bytes(max_rows * ROW.itemsize)
        results = aligned_bytes(max_rows * SAMPLED.itemsize)
        self._spaces = SPACES_EACH * threads
        spaces = aligned_bytes(self._spaces * round_up(vocab_size, TILE) * 4)
        arguments = Sample(rows, ROW.itemsize, results, SAMPLED.itemsize, spaces, vocab_size)
        capture.append(("sample", None), Param.SEQUENCES, arguments, dynamic=True)
        self._rows, self._results = rows.numpy().view(ROW), results.numpy().view(SAMPLED)
        self._program = finish(capture, ())

    def __call__(self, rows: Records) -> Records:
        """`SAMPLED` for each of some `ROW`. What their addresses point at must be alive meanwhile;
        logits are read in whole vectors of 16."""
        num = len(rows)
        self._rows[:num] = rows
        sizes = dict.fromkeys(Param, 0)
        sizes |= {Param.LOGIT_ROWS: num, Param.SEQUENCES: min(num, self._spaces)}
        self._program.run([*sizes.values()])
        return self._results[:num].copy()
