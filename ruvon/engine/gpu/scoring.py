"""What a model thought of tokens, computed on the device: what comes back is a few numbers each.

Of prompts, chunks are run once more for the hidden states of all their tokens, and scored a piece
at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ruvon.engine.batch import Windows, ints, lay_out, to_device
from ruvon.engine.draw import undrawable
from ruvon.engine.logprobs import entry
from ruvon.engine.types import Chunk, Plan, PromptRow, Tables, TokenLogprobs
from ruvon.kernels.ops import ForwardBatch
from ruvon.kernels.scores import score

Top: TypeAlias = tuple[Tensor, Tensor]
"""Ids and log-probabilities of the likeliest tokens, of a row or of several."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """One chunk's prompt logprobs, to be read once its step is over."""

    targets: tuple[int, ...]
    columns: list[Tensor]
    """By position: the best logit, the target's log-probability and rank, the alternatives' ids and
    log-probabilities."""

    def read(self) -> tuple[tuple[TokenLogprobs, ...], str | None]:
        """The entries, and why there are none for some position."""
        entries, error = [], None
        columns = [column.tolist() for column in self.columns]
        for target, best, *about in zip(self.targets, *columns, strict=True):
            error = undrawable(best) or error
            entries.append(entry(target, *about))
        return tuple(entries if error is None else ()), error


class Scorer:
    """Launches what scores chunks, or adds up their hidden states, on the current stream."""

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

    def score(self, plan: Plan, tables: Mapping[int, Tables]) -> dict[int, PromptScores]:
        """What a plan's ``prompt_rows`` want, by sequence; a stage before the last has nothing to
        tell."""
        scores = {}
        for row in plan.prompt_rows:
            hidden_QC = self._run(plan.chunks[row.chunk], 0, len(row.targets), tables)
            if self._logits is not None:
                scores[row.seq_id] = self._score(hidden_QC, row, self._logits)
        return scores

    def pool(self, plan: Plan, tables: Mapping[int, Tables]) -> dict[int, Tensor]:
        """What its ``pooled_rows`` want: sums, on their way to the host."""
        sums = {}
        for rows in plan.pooled_rows:
            hidden_LC = self._run(plan.chunks[rows.chunk], rows.first, rows.count, tables)
            if self._logits is not None:
                sums[rows.seq_id] = to_host(hidden_LC.sum(0, dtype=torch.float64))
        return sums

    def _run(self, chunk: Chunk, first: int, count: int, tables: Mapping[int, Tables]) -> Tensor:
        """The hidden states of so many tokens. One chunk at a time: kernels are compiled for
        numbers of sequences."""
        plan = Plan(0, (replace(chunk, samples=False),))
        layout = lay_out(plan, tables, self._block_size, self._windows)
        layout.logit_rows = ints([*range(first, first + count)])
        return self._hidden(layout.to_batch(self._device))

    def _score(
        self, hidden_QC: Tensor, row: PromptRow, logits: Callable[[Tensor], Tensor]
    ) -> PromptScores:
        """Score ``row.targets``, which follow the tokens of a chunk."""
        (targets_Q,) = to_device((ints([*row.targets]),), self._device)
        cut = partial(torch.split, split_size_or_sections=self._piece)
        pieces = [
            score_piece(logits(piece_QC), piece_Q, row.num_top)
            for piece_QC, piece_Q in zip(cut(hidden_QC), cut(targets_Q), strict=True)
        ]
        columns = [to_host(torch.cat(parts)) for parts in zip(*pieces, strict=True)]
        return PromptScores(row.targets, columns)


def score_piece(logits_QV: Tensor, targets_Q: Tensor, num_top: int) -> tuple[Tensor, ...]:
    norm_Q, rank_Q = score(logits_QV, targets_Q)
    logprob_Q = logits_QV.gather(-1, targets_Q[:, None].long())[:, 0] - norm_Q
    return (logits_QV.amax(-1), logprob_Q, rank_Q, *likeliest(logits_QV, norm_Q, num_top))


def alternatives(logits_LV: Tensor, wanted: Mapping[int, int | tuple[int, ...]]) -> dict[int, Top]:
    """The likeliest tokens of some rows of logits: row → how many are ``wanted``, or which.

    All rows' norms come from one kernel, for torch's own sum of a row depends on where it begins in
    memory, and so on its place in the batch.
    """
    if not any(wanted.values()):
        return dict.fromkeys(wanted, (torch.empty(0), torch.empty(0)))
    with torch.inference_mode():
        norm_L, _ = score(logits_LV, torch.zeros_like(logits_LV[:, 0], dtype=torch.int32))
        tops = {i: likeliest(logits_LV[i], norm_L[i], each) for i, each in wanted.items()}
        return {i: (to_host(ids), to_host(logprobs)) for i, (ids, logprobs) in tops.items()}


def likeliest(logits_QV: Tensor, norm_Q: Tensor, wanted: int | tuple[int, ...]) -> Top:
    """The likeliest tokens of each row, so many, or those that are wanted."""
    if isinstance(wanted, int):
        logits, ids = logits_QV.topk(min(wanted, logits_QV.shape[-1]))
    else:
        (words,) = to_device((ints([*wanted]),), logits_QV.device)
        logits, ids = logits_QV[..., words.long()], words
    return ids, logits - norm_Q[..., None]


def to_host(values: Tensor) -> Tensor:
    """On the way to memory of the host's that the device can write to by itself."""
    if not values.is_cuda:
        return values
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
