"""How likely a model found its tokens, before anything a request changes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ruvon.engine.draw import Floats, largest, undrawable
from ruvon.engine.types import PromptRow, TokenLogprobs

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot carry


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
    rank = int(np.count_nonzero(logits_V > logits_V[token])) + 1
    logprob, *others = (float(logit) - norm for logit in logits_V[[token, *top]])
    return entry(token, logprob, rank, top, others)


def entry(
    token: int, logprob: float, rank: int, top: Iterable[int], logprobs: Iterable[float]
) -> TokenLogprobs:
    """With the alternatives ``top``, and ``logprobs`` of theirs."""
    pairs = zip(top, map(finite, logprobs), strict=True)
    return TokenLogprobs(token, finite(logprob), rank, tuple(pairs))


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
