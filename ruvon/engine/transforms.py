"""What a request changes of a row's scores before one is drawn, each thing a function.

Ids repeat harmlessly where the new value is computed from a value read before any was written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np

from ruvon.engine.draw import Floats, Indices
from ruvon.engine.types import SamplingParams, SamplingRow

Transform: TypeAlias = Callable[[Floats, SamplingRow, Sequence[int]], None]
"""Changes one row's scores in place; told of the tokens that end an answer."""


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
    """There may be hundreds of words, but of few lengths."""
    if row.word_ends is None:
        row.word_ends = ends_by_head(row.sampling.bad_words)
    history, size = row.history, len(row.history)
    return [
        last
        for length, ends in row.word_ends.items()
        if length <= size
        for last in ends.get(tuple(history[size - length :]), ())
    ]


def ends_by_head(
    words: Iterable[tuple[int, ...]],
) -> dict[int, dict[tuple[int, ...], list[int]]]:
    """Words' last tokens, by the length of what comes before and by that."""
    ends: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for *head, last in words:
        ends.setdefault(len(head), {}).setdefault(tuple(head), []).append(last)
    return ends


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


def is_penalized(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1 or bool(
        sampling.frequency_penalty or sampling.presence_penalty
    )


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
