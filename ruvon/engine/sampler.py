"""Logits to tokens: what a request asks of the model's distribution, then one draw from it.

Every row is computed by itself, from its own logits, history, seed and position, so a request draws
the same tokens alone or in any batch. A row passes, in this order (vLLM's; typical_p last, where
Hugging Face has it):

1. `transforms`, which change scores: the grammar's mask, allowed_token_ids, bad_words,
   min_tokens, logit_bias, then the repetition, frequency and presence penalties;
2. temperature;
3. filters, which keep part of the distribution and renormalise it: top_k, min_p, top_p, typical_p
   (min_p compares with the likeliest token, so it keeps the same on either side of top_k);
4. the draw: one uniform number out of Philox, keyed by the seed and counted by the position in the
   output, finds its token by inverting the cumulative distribution in the order of token ids.

`draw` has all but the first. Among equally likely tokens the lowest id comes first, everywhere.
Logprobs are the model's own, before all of this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from torch import Tensor

from ruvon.engine.draw import Floats, draw, undrawable
from ruvon.engine.logprobs import token_logprobs
from ruvon.engine.transforms import Transform, transforms_of
from ruvon.engine.types import SamplingRow, StepResult, TokenLogprobs

RowResult: TypeAlias = tuple[tuple[int, ...], tuple[TokenLogprobs, ...] | None, str | None]


def sample(
    logits_LV: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int]
) -> StepResult:
    """Draw one token for each row. ``logits_LV`` is float32, row for row, and stays as it is.

    A row that cannot be sampled from (its logits are not numbers, or every token is ruled out) gets
    no token and an entry in ``errors``; the others are unharmed.
    """
    if all(row.plain for row in rows):
        return sample_greedy(logits_LV, rows)
    draws = [
        sample_row(logits_V, row, transforms_of(row), eos_token_ids)
        for logits_V, row in zip(logits_LV.numpy(force=True), rows, strict=True)
    ]
    return join_rows(rows, draws)


def join_rows(rows: Sequence[SamplingRow], draws: Sequence[RowResult]) -> StepResult:
    """A step's result out of its rows' (one at least)."""
    tokens, logprobs, errors = zip(*draws, strict=True)
    failed = {row.seq_id: error for row, error in zip(rows, errors, strict=True) if error}
    return StepResult(tokens, logprobs, errors=failed)


def sample_greedy(logits_LV: Tensor, rows: Sequence[SamplingRow]) -> StepResult:
    """The likeliest token of each row, when nobody wants anything else."""
    if logits_LV.is_cuda:
        best_L, ids_L = (tensor_L.numpy(force=True) for tensor_L in logits_LV.max(dim=-1))
    else:
        logits = logits_LV.numpy()
        ids_L = logits.argmax(axis=-1)
        best_L = logits[np.arange(len(rows)), ids_L]
    return greedy_result(rows, ids_L.tolist(), best_L.tolist())


def greedy_result(
    rows: Sequence[SamplingRow], ids_L: Sequence[int], best_L: Sequence[float]
) -> StepResult:
    """What the likeliest tokens and their logits come to."""
    tokens: list[tuple[int, ...]] = [(id,) for id in ids_L]
    errors = {}
    for at, best in enumerate(best_L):
        if not math.isfinite(best):
            errors[rows[at].seq_id] = undrawable(best) or ""
            tokens[at] = ()
    return StepResult(tuple(tokens), (None,) * len(rows), errors=errors)


def sample_row(
    logits_V: Floats,
    row: SamplingRow,
    transforms: Sequence[Transform],
    eos_token_ids: Sequence[int],
) -> RowResult:
    """One row's token, its logprobs if wanted, and why there is none."""
    scores_V = logits_V.copy() if transforms else logits_V
    for transform in transforms:
        transform(scores_V, row, eos_token_ids)
    error = undrawable(float(logits_V.max()))
    if transforms and not error:
        error = undrawable(float(scores_V.max()))
    if error:
        return (), None, error
    token = draw(scores_V, row)
    if row.sampling.logprobs is None:
        return (token,), None, None
    told = token_logprobs(logits_V, token, row.sampling.logprobs, row.sampling.logprob_token_ids)
    return (token,), (told,), None
