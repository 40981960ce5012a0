"""A model's whole step as one native call: recorded once, replayed for every batch.

It is to a CPU what a CUDA graph is to a GPU, but sizes stay free: instructions read the number of
tokens, sequences and logit rows when they run, so one tape serves every batch up to its limits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ruvon.kernels.cpu.compiled import Compiled
from ruvon.kernels.cpu.layout import aligned_bytes
from ruvon.kernels.cpu.program import INSTRUCTION_BYTES, PANEL, QUERY_TOKENS, Field, Param
from ruvon.kernels.cpu.recorder import Recording
from ruvon.kernels.cpu.team import Team
from ruvon.kernels.ops import ForwardBatch

Forward: TypeAlias = Callable[[ForwardBatch, Sequence[tuple[Tensor, Tensor]]], Tensor]
Progress: TypeAlias = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest step a tape must serve."""

    tokens: int
    sequences: int
    logit_rows: int
    blocks_per_sequence: int


class Program:
    """A finished recording in memory, ready to run."""

    def __init__(self, recording: Recording, compiled: Compiled, team: Team) -> None:
        recording.foresee()
        self.instructions = recording.instructions
        self._kept = recording.kept, recording.values
        self._team = team
        memory = aligned_bytes(len(self.instructions) * INSTRUCTION_BYTES)
        self._memory = memory.view(torch.int64).view(-1, INSTRUCTION_BYTES // 8)
        for line, instruction in zip(self._memory, self.instructions, strict=True):
            line[Field.KERNEL] = compiled.address(instruction.kernel)
            for field, number in instruction.fields.items():
                line[field] = number

    def run(self, sizes: Sequence[int], lines: Tensor | None = None) -> None:
        """One step of these sizes; returns when all threads are done.

        ``lines`` runs some instructions only, as `pick` makes them: to find out what takes long.
        """
        self._team.run(self._memory if lines is None else lines, sizes)

    def pick(self, numbers: Sequence[int]) -> Tensor:
        """A copy of the instructions of these numbers."""
        lines = aligned_bytes(len(numbers) * INSTRUCTION_BYTES).view(torch.int64)
        lines = lines.view(-1, INSTRUCTION_BYTES // 8)
        lines.copy_(self._memory[list(numbers)])
        return lines


def sizes_of(query_starts: np.ndarray[Any, Any], logit_rows: int) -> list[int]:
    """The parameters of a step, in the order of `Param`; ``query_starts`` [S + 1] as in a batch."""
    tokens, sequences = int(query_starts[-1]), len(query_starts) - 1
    tiles = tokens
    if tokens != sequences:
        tiles = int((-(-np.diff(query_starts) // QUERY_TOKENS)).sum())
    return [tokens, -(-tokens // PANEL), logit_rows, -(-logit_rows // PANEL), sequences, tiles]


assert [*Param] == [
    Param.TOKENS,
    Param.TOKEN_PANELS,
    Param.LOGIT_ROWS,
    Param.LOGIT_PANELS,
    Param.SEQUENCES,
    Param.QUERY_TILES,
]


class Tape:
    """One model's step. `replay` is a runner's ``forward``."""

    def __init__(
        self,
        forward: Forward,
        cache: Sequence[tuple[Tensor, Tensor]],
        limits: Limits,
        recording: Recording,
        finish: Callable[[Recording], Program],
    ) -> None:
        """``recording`` is the one that the model's operations write to."""
        self.limits = limits
        self._batch = empty_batch(limits)
        self._arrays = [getattr(self._batch, name).numpy() for name in COPIED]
        self._tables = self._batch.block_tables.numpy()
        logits = forward(self._batch, cache)
        likeliest = torch.zeros(limits.logit_rows, dtype=torch.int64)
        recording.argmax(logits, likeliest)
        self._likeliest = likeliest.numpy()
        self._logits = logits
        self.program = finish(recording)
        self.num_rows = 0

    def replay(self, batch: ForwardBatch) -> Tensor:
        """float32 logits [L, V] of the batch's ``logit_rows``, valid until the next replay.

        The batch may be of numpy arrays. All between two replays runs with cold caches, as weights
        have just streamed through them, and torch is a long way to a few numbers.
        """
        tables = np.asarray(batch.block_tables)
        self._tables[: tables.shape[0], : tables.shape[1]] = tables
        given = [np.asarray(getattr(batch, name)) for name in COPIED]
        for array, numbers in zip(self._arrays, given, strict=True):
            array[: numbers.size] = numbers
        self.num_rows = given[-1].size
        self.program.run(sizes_of(given[STARTS], self.num_rows))
        return self._logits[: self.num_rows]

    @property
    def argmax(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[L]: the likeliest token of each row of the last replay; of equals, the first."""
        return self._likeliest[: self.num_rows]


COPIED = ("token_ids", "positions", "slots", "query_starts", "context_lens", "logit_rows")
STARTS = COPIED.index("query_starts")


def empty_batch(limits: Limits) -> ForwardBatch:
    """The batch whose memory the instructions read."""

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    return ForwardBatch(
        token_ids=ints(limits.tokens),
        positions=ints(limits.tokens),
        slots=ints(limits.tokens),
        block_tables=ints(limits.sequences, limits.blocks_per_sequence),
        query_starts=ints(limits.sequences + 1),
        context_lens=ints(limits.sequences),
        logit_rows=ints(limits.logit_rows),
        max_query=limits.tokens,
        max_context=0,
    )
