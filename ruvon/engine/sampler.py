"""Logits to tokens: what a request asks of the model's distribution, then one draw from it.

Every row is computed by itself, from its own logits, history, seed and position, so a request draws
the same tokens alone or in any batch. A row passes, in this order (vLLM's; typical_p last, where
Hugging Face has it):

1. ``TRANSFORMS``, which change scores: the grammar's mask, allowed_token_ids, bad_words,
   min_tokens, logit_bias, then the repetition, frequency and presence penalties;
2. temperature;
3. filters, which keep part of the distribution and renormalise it: top_k, min_p, top_p, typical_p
   (min_p compares with the likeliest token, so it keeps the same on either side of top_k);
4. the draw: one uniform number out of Philox, keyed by the seed and counted by the position in the
   output, finds its token by inverting the cumulative distribution in the order of token ids.

Among equally likely tokens the lowest id comes first, everywhere. Logprobs are the model's own,
before all of this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.random import Philox
from torch import Tensor

from ruvon.engine.types import (
    PromptRow,
    SamplingParams,
    SamplingRow,
    StepResult,
    TokenLogprobs,
)

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.floating[Any]]]
Indices: TypeAlias = np.ndarray[Any, np.dtype[np.integer[Any]]]
RowResult: TypeAlias = tuple[tuple[int, ...], tuple[TokenLogprobs, ...] | None, str | None]

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot carry
TILE = 128  # entries summarised by one number, so that most need no closer look


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


def undrawable(best: float) -> str | None:
    """Why no token can be drawn from scores with this maximum (numpy's is NaN if any one is)."""
    if np.isnan(best):
        return "the model computed logits that are not numbers (NaN)"
    if best == np.inf:
        return "the model computed an infinite logit"
    if best == -np.inf:
        return "no token is left: every one is ruled out by what the request bans or allows"
    return None


# ------------------------------------------------------------------------------- 1. transforms
# Each changes one row's scores in place. Ids repeat harmlessly where the new value is computed
# from a value read before any was written.

Transform: TypeAlias = Callable[[Floats, SamplingRow, Sequence[int]], None]


def obey(scores_V: Floats, row: SamplingRow, eos_token_ids: Sequence[int]) -> None:
    """Nothing but what the grammar allows now."""
    assert row.mask is not None
    allowed_V = np.unpackbits(row.mask.view(np.uint8), count=len(scores_V), bitorder="little")
    scores_V[allowed_V == 0] = -np.inf


def allow(scores_V: Floats, row: SamplingRow, eos_token_ids: Sequence[int]) -> None:
    ids = list(row.sampling.allowed_token_ids or ())
    kept = scores_V[ids]
    scores_V.fill(-np.inf)
    scores_V[ids] = kept


def ban_words(scores_V: Floats, row: SamplingRow, eos_token_ids: Sequence[int]) -> None:
    """A word is banned where its last token would complete it, wherever it began."""
    scores_V[completing_ids(row)] = -np.inf


def completing_ids(row: SamplingRow) -> list[int]:
    return [
        last
        for *head, last in row.sampling.bad_words
        if not head or row.history[-len(head) :] == head
    ]


def delay_stop(scores_V: Floats, row: SamplingRow, eos_token_ids: Sequence[int]) -> None:
    """Nothing that would stop the sequence is sampled before its ``min_tokens``."""
    scores_V[stopping_ids(row, eos_token_ids)] = -np.inf


def is_held(sampling: SamplingParams, num_output: int) -> bool:
    """Whether stop tokens are to be ruled out here; a grammar's mask sees to that itself."""
    return num_output < sampling.min_tokens and sampling.grammar is None


def stopping_ids(row: SamplingRow, eos_token_ids: Sequence[int]) -> list[int]:
    eos = () if row.sampling.ignore_eos else eos_token_ids
    return [*row.sampling.stop_token_ids, *eos]


def bias(scores_V: Floats, row: SamplingRow, eos_token_ids: Sequence[int]) -> None:
    for token, amount in row.sampling.logit_bias.items():
        scores_V[token] += amount


def penalize_repetition(scores_V: Floats, row: SamplingRow, eos_token_ids: Sequence[int]) -> None:
    """Hugging Face's rule, over prompt and output: whatever its sign, a score gets less likely."""
    penalty = row.sampling.repetition_penalty
    ids = np.array(row.history)
    seen = scores_V[ids]
    scores_V[ids] = np.where(seen > 0, seen / penalty, seen * penalty)


def penalize_output(scores_V: Floats, row: SamplingRow, eos_token_ids: Sequence[int]) -> None:
    """OpenAI's rule, over the output: once for being there, and once for every time it is."""
    ids, penalties = output_penalties(row)
    scores_V[ids] -= penalties


def output_penalties(row: SamplingRow) -> tuple[Indices, Floats]:
    """The output's distinct tokens, and what to take from the score of each."""
    output = np.array(row.history[row.num_prompt :], dtype=np.int64)
    ids, counts = np.unique(output, return_counts=True)
    penalties = counts * row.sampling.frequency_penalty + row.sampling.presence_penalty
    return ids, penalties.astype(np.float32)


TRANSFORMS: tuple[tuple[Callable[[SamplingParams, int], bool], Transform], ...] = (
    (lambda sampling, num_output: sampling.grammar is not None, obey),
    (lambda sampling, num_output: sampling.allowed_token_ids is not None, allow),
    (lambda sampling, num_output: bool(sampling.bad_words), ban_words),
    (lambda sampling, num_output: is_held(sampling, num_output), delay_stop),
    (lambda sampling, num_output: bool(sampling.logit_bias), bias),
    (lambda sampling, num_output: sampling.repetition_penalty != 1, penalize_repetition),
    (
        lambda sampling, num_output: bool(sampling.frequency_penalty or sampling.presence_penalty),
        penalize_output,
    ),
)
"""When a transform is wanted, given the tokens sampled so far, and the transform; in order."""


def transforms_of(row: SamplingRow) -> list[Transform]:
    num_output = len(row.history) - row.num_prompt
    return [transform for wanted, transform in TRANSFORMS if wanted(row.sampling, num_output)]


# -------------------------------------------------------------- 2 to 4. temperature, filters, draw


def draw(scores_V: Floats, row: SamplingRow) -> int:
    """One token out of scores whose maximum is finite."""
    if np.float32(row.sampling.temperature) == 0:  # what divides float32 scores
        return int(scores_V.argmax())
    ids_K, weights_K = distribution(scores_V, row.sampling)
    picked = invert(weights_K, uniform(row.seed, len(row.history) - row.num_prompt))
    return picked if ids_K is None else int(ids_K[picked])


def is_greedy(sampling: SamplingParams) -> bool:
    """Whether the temperature is 0 to those who compute in float32."""
    return float(np.float32(sampling.temperature)) == 0


def distribution(scores_V: Floats, sampling: SamplingParams) -> tuple[Indices | None, Floats]:
    """What remains to draw from: token ids going up (None: all) and their weights, not normalised.

    The likeliest token weighs 1, until a filter drops it (only typical_p can).
    """
    ids: Indices | None = None
    if 0 < sampling.top_k < len(scores_V):
        ids = largest(scores_V, sampling.top_k)
    scores = scores_V if ids is None else scores_V[ids]
    weights = scores - scores.max()
    with np.errstate(over="ignore"):  # a tiny temperature sends scores to -inf, as it should
        weights /= np.float32(sampling.temperature)
    np.exp(weights, out=weights)
    for threshold, off, keep in (
        (sampling.min_p, 0.0, likely),
        (sampling.top_p, 1.0, nucleus),
        (sampling.typical_p, 1.0, typical),
    ):
        if threshold != off:
            kept = keep(weights, threshold)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
    return ids, weights


def likely(weights_K: Floats, min_p: float) -> Indices:
    """Those at least ``min_p`` times as likely as the likeliest, which weighs 1."""
    return np.flatnonzero(weights_K >= min_p)


def nucleus(weights_K: Floats, top_p: float) -> Indices:
    """The fewest tokens, likeliest first, whose probabilities add up to ``top_p``; one at least.

    Only a head of the distribution is sorted. What is below the second floor could together not
    make up the last ``1 - top_p``, so that head holds the nucleus; the first is smaller and mostly
    does, which its own sum tells.
    """
    total = float(weights_K.sum())
    for parts in (512, len(weights_K)):
        head = np.flatnonzero(weights_K >= (1 - top_p) * total / parts)
        falling = np.sort(weights_K[head])[::-1]
        reached = np.cumsum(falling, dtype=np.float64)
        if len(head) and reached[-1] >= top_p * total:
            break
    count = min(int(np.searchsorted(reached, top_p * total)) + 1, len(head))
    return head[at_least(weights_K[head], falling[count - 1], count)]


def typical(weights_K: Floats, typical_p: float) -> Indices:
    """Those whose surprise is nearest to the expected (the entropy), up to ``typical_p`` in all.

    Locally typical sampling (Meister et al., https://arxiv.org/abs/2202.00666), as Hugging Face
    computes it: every token as near as the last one needed stays.
    """
    p = weights_K.astype(np.float64) / weights_K.sum(dtype=np.float64)
    surprise = -np.log(p, out=np.full_like(p, -np.inf), where=p > 0)
    entropy = float((p[p > 0] * surprise[p > 0]).sum())
    distance = np.abs(surprise - entropy)
    for count in (min(256, len(p)), len(p)):  # the nearest few mostly do
        near = largest(-distance, count)
        near = near[np.argsort(distance[near], kind="stable")]
        reached = np.cumsum(p[near])
        if reached[-1] >= typical_p:
            break
    last = min(int(np.searchsorted(reached, typical_p)), len(near) - 1)
    return np.flatnonzero(distance <= distance[near[last]])


def largest(values_V: Floats, count: int) -> Indices:
    """Where the ``count`` largest values are, in order of index."""
    peaks = np.maximum.reduceat(values_V, np.arange(0, len(values_V), TILE))
    # As many values as tiles reach the count-th highest peak, so nothing below it is among them.
    head = np.arange(len(values_V))
    if count <= len(peaks):
        head = np.flatnonzero(values_V >= np.partition(peaks, -count)[-count])
    values = values_V[head]
    return head[at_least(values, np.partition(values, -count)[-count], count)]


def at_least(values_K: Floats, cut: Any, count: int) -> Indices:
    """Where values reach ``cut``, the ``count``-th largest; of those equal to it, the first few."""
    kept = np.flatnonzero(values_K >= cut)
    if len(kept) > count:
        tied = np.flatnonzero(values_K[kept] == cut)
        kept = np.delete(kept, tied[count - len(kept) :])
    return kept


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else. 48 bits: no product with it rounds up to
    the whole."""
    bits = int(Philox(key=seed % 2**64, counter=position).random_raw())
    return (bits >> 16) * 2.0**-48


def invert(weights_K: Floats, share: float) -> int:
    """The index at which the running sum of weights passes ``share`` of their total.

    First among tiles, then inside one: the running sum over a whole vocabulary costs more than
    all the rest of a draw.
    """
    starts = np.arange(0, len(weights_K), TILE)
    passed = np.cumsum(np.add.reduceat(weights_K, starts), dtype=np.float64)
    tile = int(np.searchsorted(passed, share * passed[-1], side="right"))
    before = float(passed[tile - 1]) if tile else 0.0
    inside = np.cumsum(weights_K[starts[tile] : starts[tile] + TILE], dtype=np.float64)
    rest = (share * passed[-1] - before) / (passed[tile] - before)
    # The tile's sum was rounded to float32, so what is left is a share of it, kept below all of it.
    rest = min(rest, 1 - 2.0**-48)
    return int(starts[tile]) + int(np.searchsorted(inside, rest * inside[-1], side="right"))


# ----------------------------------------------------------------------------------- logprobs


def token_logprobs(
    logits_V: Floats, token: int, num_top: int, wanted: Sequence[int] = ()
) -> TokenLogprobs:
    """How likely the model found ``token``, and those ``wanted`` or, if there are none, its
    ``num_top`` likeliest alternatives, out of logits whose maximum is finite."""
    best = logits_V.max()
    norm = float(best) + float(np.log(np.exp(logits_V - best).sum()))
    top = list(wanted)
    if num_top and not wanted:
        ids = largest(logits_V, min(num_top, len(logits_V)))
        top = ids[np.argsort(-logits_V[ids], kind="stable")].tolist()
    return TokenLogprobs(
        token=token,
        logprob=finite(float(logits_V[token]) - norm),
        rank=int(np.count_nonzero(logits_V > logits_V[token])) + 1,
        top=tuple((other, finite(float(logits_V[other]) - norm)) for other in top),
    )


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)  # the norm is a number, so this is never NaN


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Logprobs of prompt tokens, by sequence; or, for a sequence, why there are none."""

    logprobs: dict[int, tuple[TokenLogprobs, ...]]
    errors: dict[int, str]


def score_prompts(pieces_QV: Iterable[Tensor], rows: Sequence[PromptRow]) -> PromptScores:
    """Score every row's targets; ``pieces_QV`` hold the logits at their positions, in order."""
    logits = (logits_V for piece_QV in pieces_QV for logits_V in piece_QV.numpy(force=True))
    scored: dict[int, tuple[TokenLogprobs, ...]] = {}
    errors: dict[int, str] = {}
    for row in rows:
        entries = []
        for target, logits_V in zip(row.targets, logits, strict=False):  # targets end first
            if error := undrawable(float(logits_V.max())):
                errors[row.seq_id] = error
            else:
                entries.append(token_logprobs(logits_V, target, row.num_top))
        scored[row.seq_id] = tuple(entries)
    return PromptScores(scored, errors)
