"""Sampling by compiled kernels: what `ruvon.engine.sampler` computes, in a fraction of the time.

The order of steps, the random numbers and the ties are the same. Sums are added up in another
order and exponentials rounded otherwise, some 1e-7 of them, so a draw can differ where its random
number, or a filter's threshold, falls that close to the boundary between two tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from ruvon.engine.draw import Floats, Indices, is_greedy, undrawable
from ruvon.engine.logprobs import entry
from ruvon.engine.sampler import RowResult, greedy_result, join_rows, sample_row
from ruvon.engine.transforms import (
    completing_ids,
    is_held,
    obey,
    output_penalties,
    stopping_ids,
    transforms_of,
)
from ruvon.engine.types import SamplingParams, SamplingRow, StepResult
from ruvon.kernels.cpu.sampling import ROW, Sampler

Ids: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]


class CpuSampler:
    """Draws from the logits of the model's last step, on the threads that computed it."""

    def __init__(self, kernel: Sampler, argmax: Callable[[], Indices]) -> None:
        """``argmax``: the likeliest token of each row, [L], which the step has found."""
        self._kernel = kernel
        self._argmax = argmax

    def __call__(
        self, logits_LV: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int]
    ) -> StepResult:
        """As `ruvon.engine.sampler.sample`, but for rows with a grammar, whose logits may change.
        Rows of logits are padded to whole vectors."""
        logits = logits_LV.numpy()
        if all(row.plain for row in rows):
            ids_L = self._argmax()[: len(rows)].tolist()
            return greedy_result(rows, ids_L, [float(logits[at]) for at in enumerate(ids_L)])
        done: dict[int, RowResult] = {}
        compiled = []
        for n, row in enumerate(rows):
            if is_compiled(row.sampling):
                if row.sampling.grammar is not None:
                    obey(logits[n], row, eos_token_ids)
                compiled.append(n)
            else:  # rare enough to have no kernel
                done[n] = sample_row(logits[n], row, transforms_of(row), eos_token_ids)
        done |= zip(compiled, self._draw(logits, compiled, rows, eos_token_ids), strict=True)
        return join_rows(rows, [done[n] for n in range(len(rows))])

    def _draw(
        self,
        logits_LV: Floats,
        places: Sequence[int],
        rows: Sequence[SamplingRow],
        eos_token_ids: Sequence[int],
    ) -> list[RowResult]:
        """The draws of the rows at some places."""
        chosen = [rows[n] for n in places]
        edits = [edits_of(row, eos_token_ids) for row in chosen]
        tops = [np.zeros(num_top(row, logits_LV.shape[1]), np.int32) for row in chosen]
        base, stride = logits_LV.ctypes.data, logits_LV.strides[0]
        records = [
            record(row, edit, base + n * stride, top)
            for n, row, edit, top in zip(places, chosen, edits, tops, strict=True)
        ]
        sampled = self._kernel(np.array(records, dtype=ROW)).tolist()
        return [
            outcome(row, logits_LV[n], each, top)
            for n, row, each, top in zip(places, chosen, sampled, tops, strict=True)
        ]


def is_compiled(sampling: SamplingParams) -> bool:
    """Whether the kernel does it. Logits lose what a grammar rules out before it sees them, so it
    cannot tell what the model thought of them."""
    return sampling.typical_p == 1 and (sampling.grammar is None or sampling.logprobs is None)


@dataclass(frozen=True, slots=True)
class Edits:
    """What a row changes of its scores."""

    ids: Ids  # allowed, biased, seen, counted
    amounts: Floats  # to add to biased and counted ones
    counts: tuple[int, ...]  # of each kind; the first is -1 if all are allowed


NO_EDITS = Edits(np.zeros(0, np.int32), np.zeros(0, np.float32), (-1, 0, 0, 0))


def edits_of(row: SamplingRow, eos_token_ids: Sequence[int]) -> Edits:
    """In numbers, what `ruvon.engine.transforms` do."""
    if not transforms_of(row):
        return NO_EDITS
    sampling, history = row.sampling, row.history
    allowed, bias = sampling.allowed_token_ids, sampling.logit_bias
    banned = completing_ids(row)
    if is_held(sampling, len(history) - row.num_prompt):
        banned += stopping_ids(row, eos_token_ids)
    amounts = [*bias.values(), *[-math.inf] * len(banned)]
    seen = history if sampling.repetition_penalty != 1 else []
    counted: Indices = NO_EDITS.ids
    penalties = NO_EDITS.amounts
    if sampling.frequency_penalty or sampling.presence_penalty:
        counted, penalties = output_penalties(row)
    parts = (allowed or (), [*bias, *banned], seen, counted)
    num_allowed, *others = (len(part) for part in parts)
    return Edits(
        np.concatenate([np.asarray(part, np.int32) for part in parts]),
        np.concatenate([np.array(amounts, np.float32), -penalties]),
        (-1 if allowed is None else num_allowed, *others),
    )


def num_top(row: SamplingRow, vocab_size: int) -> int:
    """How many of the likeliest tokens are to be found."""
    wanted = 0 if row.sampling.logprob_token_ids else row.sampling.logprobs
    return min(wanted or 0, vocab_size)


def address(array: Ids | Floats) -> int:
    return array.ctypes.data if array.size else 0


def record(row: SamplingRow, edits: Edits, logits: int, top: Ids) -> tuple[float, ...]:
    """A row for the kernel, in the order of `SampledRow`; ``logits`` is an address."""
    sampling = row.sampling
    return (
        logits,
        0.0 if is_greedy(sampling) else sampling.temperature,
        sampling.top_k,
        sampling.min_p,
        sampling.top_p,
        row.seed % 2**64,
        len(row.history) - row.num_prompt,
        address(edits.ids),
        address(edits.amounts),
        *edits.counts,
        sampling.repetition_penalty,
        -1 if sampling.logprobs is None else top.size,
        address(top),
    )


def outcome(
    row: SamplingRow, logits_V: Floats, drawn: tuple[int, int, float], top: Ids
) -> RowResult:
    """A row's token, its logprobs if wanted, and why there is none, of a `SampledToken`."""
    token, rank, norm = drawn
    if token < 0:
        return (), None, undrawable(norm)
    if row.sampling.logprobs is None:
        return (token,), None, None
    best = [
        *row.sampling.logprob_token_ids,
        *top[np.argsort(-logits_V[top], kind="stable")].tolist(),
    ]
    logprob, *others = (float(logit) - norm for logit in logits_V[[token, *best]])
    return (token,), (entry(token, logprob, rank, best, others),), None
