"""What no sampler can do, refused before it is queued: an error in a step would hit everybody."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from ruvon.engine.types import SamplingParams
from ruvon.errors import RequestError

BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, math.inf),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "min_tokens": (0, math.inf),
    "logprobs": (0, math.inf),
    "prompt_logprobs": (0, math.inf),
}
"""Least and greatest value of each number, both allowed unless infinite."""


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError, naming the field, for numbers out of bounds and ids of no token."""
    for name, (least, most) in BOUNDS.items():
        value = getattr(sampling, name)
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise RequestError(f"{name} must be {wanted}, not {value}.", name)
    if not 0 < sampling.repetition_penalty < math.inf:
        raise RequestError(
            f"repetition_penalty must be above 0, not {sampling.repetition_penalty}.",
            "repetition_penalty",
        )
    if not all(math.isfinite(amount) for amount in sampling.logit_bias.values()):
        raise RequestError("logit_bias must hold finite numbers.", "logit_bias")
    if not all(sampling.bad_words):
        raise RequestError("A bad word must have at least one token.", "bad_words")
    check_ids(sampling.logit_bias, vocab_size, "logit_bias")
    check_ids(sampling.stop_token_ids, vocab_size, "stop_token_ids")
    check_ids(sampling.allowed_token_ids or (), vocab_size, "allowed_token_ids")
    if sampling.allowed_token_ids == ():
        raise RequestError("allowed_token_ids must name at least one token.", "allowed_token_ids")
    for word in sampling.bad_words:
        check_ids(word, vocab_size, "bad_words")


def check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raises RequestError for an id outside the vocabulary."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"Token id {token} is not in the vocabulary of {vocab_size}.", param)
