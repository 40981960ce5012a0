"""One token out of scores: temperature, filters, and one uniform number."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.random import Philox

from ruvon.engine.types import SamplingParams, SamplingRow

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.floating[Any]]]
Indices: TypeAlias = np.ndarray[Any, np.dtype[np.integer[Any]]]

NOT_A_NUMBER = "the model computed logits that are not numbers (NaN)"
INFINITE = "the model computed an infinite logit"
NOTHING_LEFT = "no token is left: every one is ruled out by what the request bans or allows"

TILE = 128  # entries summarised by one number, so that most need no closer look


def undrawable(best: float) -> str | None:
    """Why no token can be drawn from scores with this maximum (numpy's is NaN if any one is)."""
    if np.isnan(best):
        return NOT_A_NUMBER
    if best == np.inf:
        return INFINITE
    if best == -np.inf:
        return NOTHING_LEFT
    return None


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
