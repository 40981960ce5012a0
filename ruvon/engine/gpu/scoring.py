"""Prompt logprobs: chunks are run once more for the hidden states of all their tokens, and scored
on the device a piece at a time; what comes back is a few numbers a position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ruvon.engine.batch import Windows, lay_out, to_device
from ruvon.engine.draw import undrawable
from ruvon.engine.logprobs import finite
from ruvon.engine.pooling import places
from ruvon.engine.types import Chunk, Plan, PooledRows, PromptRow, TokenLogprobs
from ruvon.kernels.ops import ForwardBatch
from ruvon.kernels.scores import score

Piece: TypeAlias = tuple[Tensor, ...]
"""By position, on the way to the host: the best logit, the target's log-probability and rank, the
alternatives' log-probabilities and ids."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """One chunk's prompt logprobs, to be read once its step is over."""

    row: PromptRow
    pieces: list[Piece]

    def read(self) -> tuple[tuple[TokenLogprobs, ...], str | None]:
        """The entries, and why there are none for some position."""
        entries, error = [], None
        columns = [
            [value for part in parts for value in part.tolist()]
            for parts in zip(*self.pieces, strict=True)
        ]
        for target, best, logprob, rank, values, ids in zip(
            self.row.targets, *columns, strict=True
        ):
            error = undrawable(best) or error
            top = tuple((token, finite(value)) for token, value in zip(ids, values, strict=True))
            entries.append(TokenLogprobs(target, finite(logprob), rank, top))
        return tuple(entries if error is None else ()), error


@dataclass(frozen=True, slots=True)
class PooledSum:
    """The sum of a chunk's hidden states, on the way to the host."""

    seq_id: int
    sum_C: Tensor


class Scorer:
    """Launches what scores a chunk, or adds up its hidden states, on the current stream."""

    def __init__(
        self,
        hidden: Callable[[ForwardBatch], Tensor],
        logits: Callable[[Tensor], Tensor] | None,
        *,
        device: torch.device,
        block_size: int,
        windows: Windows = (0,),
        max_logit_rows: int,
    ) -> None:
        """``max_logit_rows`` bounds the logits in memory at once. Where there are no ``logits``, it
        is a stage before the last, and ``hidden`` sends on what it makes."""
        self._hidden = hidden
        self._logits = logits
        self._device = device
        self._block_size = block_size
        self._windows = windows
        self._piece = max(max_logit_rows // 16, 1) * 16  # all begin on boundaries that kernels like

    def launch(self, chunk: Chunk, row: PromptRow, tables: Sequence[list[int]]) -> PromptScores:
        """Score ``row.targets``, which follow the tokens of a chunk. One chunk at a time: kernels
        are compiled for numbers of sequences."""
        plan = Plan(0, (replace(chunk, samples=False),), prompt_rows=(replace(row, chunk=0),))
        with torch.inference_mode():
            layout = lay_out(plan, {chunk.seq_id: tables}, self._block_size, self._windows)
            hidden_QC = self._hidden(layout.to_batch(self._device))
            if self._logits is None:
                return PromptScores(row, [])
            targets = np.array(row.targets, dtype=np.int32)
            targets_Q = to_device((targets,), self._device)[0]
            hidden_QC = hidden_QC[: len(targets)]  # the last token of a prompt has no target
            cut = partial(torch.split, split_size_or_sections=self._piece)
            pieces = zip(cut(hidden_QC), cut(targets_Q), strict=True)
            return PromptScores(row, [self._score(*piece, row.num_top) for piece in pieces])

    def pool(self, chunk: Chunk, row: PooledRows, tables: Sequence[list[int]]) -> PooledSum:
        """Add up the hidden states of ``row``, one chunk at a time as well."""
        plan = Plan(0, (replace(chunk, samples=False),))
        with torch.inference_mode():
            layout = lay_out(plan, {chunk.seq_id: tables}, self._block_size, self._windows)
            rows = places((replace(row, chunk=0),), layout.query_starts)
            hidden_LC = self._hidden(replace(layout, logit_rows=rows).to_batch(self._device))
            return PooledSum(row.seq_id, to_host(hidden_LC.sum(0, dtype=torch.float64)))

    def _score(self, hidden_QC: Tensor, targets_Q: Tensor, num_top: int) -> Piece:
        assert self._logits is not None
        logits_QV = self._logits(hidden_QC)
        norm_Q, rank_Q = score(logits_QV, targets_Q)
        top = logits_QV.topk(min(num_top, logits_QV.shape[1]))
        results = (
            logits_QV.amax(-1),
            logits_QV.gather(-1, targets_Q[:, None].long())[:, 0] - norm_Q,
            rank_Q,
            top.values - norm_Q[:, None],
            top.indices,
        )
        return tuple([to_host(values) for values in results])


def to_host(values: Tensor) -> Tensor:
    """On the way to memory of the host's that the device can write to by itself."""
    if not values.is_cuda:
        return values
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
