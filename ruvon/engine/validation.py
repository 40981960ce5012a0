"""What no sampler can do, refused before it is queued: an error in a step would hit everybody."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Integral, Real

from ruvon.engine.types import SamplingParams
from ruvon.errors import ContextLengthError, RequestError
from ruvon.grammars import Grammar

BOUNDS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, math.inf),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "repetition_penalty": (0, math.inf),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "seed": (-math.inf, math.inf),
    "max_tokens": (0, math.inf),
    "min_tokens": (0, math.inf),
    "logprobs": (0, math.inf),
    "prompt_logprobs": (0, math.inf),
}
"""Least and greatest value of each number, both allowed unless infinite."""

WHOLE = {"top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"}
OPTIONAL = WHOLE - {"top_k", "min_tokens"}  # None says something of its own

LEAST = 2.0**-126  # of the numbers that a GPU's float32 surely tells from 0


def normalize(sampling: SamplingParams) -> SamplingParams:
    """The same draws in numbers that every sampler can compute with: a temperature too small to
    divide by is none, and so is a share that leaves the likeliest token only. Biases are a dict of
    our own, for whoever gave them may change them, or have them in what cannot be pickled."""
    if sampling.logit_bias:
        sampling = replace(sampling, logit_bias=dict(sampling.logit_bias))
    if sampling.temperature and min(sampling.temperature, sampling.top_p) < LEAST:
        return replace(sampling, temperature=0.0)
    return sampling


def check_type(sampling: object) -> None:
    """Raises RequestError for what is no `SamplingParams`."""
    if not isinstance(sampling, SamplingParams):
        raise RequestError(f"sampling must be SamplingParams, not {sampling!r}.", "sampling")


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError, naming the field, for what is no number, numbers out of bounds and ids
    of no token."""
    check_type(sampling)
    for name, (least, most) in BOUNDS.items():
        check_number(name, getattr(sampling, name), least, most)
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise RequestError(
            f"min_tokens must not exceed max_tokens, {sampling.max_tokens}.", "min_tokens"
        )
    if not sampling.repetition_penalty:
        raise RequestError("repetition_penalty must be above 0.", "repetition_penalty")
    try:
        is_finite = all(map(math.isfinite, sampling.logit_bias.values()))
    except (AttributeError, TypeError):
        is_finite = False
    if not is_finite:
        raise RequestError("logit_bias must map token ids to finite numbers.", "logit_bias")
    if not all(sampling.bad_words):
        raise RequestError("A bad word must have at least one token.", "bad_words")
    check_ids(sampling.logit_bias, vocab_size, "logit_bias")
    check_ids(sampling.stop_token_ids, vocab_size, "stop_token_ids")
    check_ids(sampling.allowed_token_ids or (), vocab_size, "allowed_token_ids")
    check_ids(sampling.logprob_token_ids, vocab_size, "logprob_token_ids")
    if sampling.logprob_token_ids and sampling.logprobs is None:
        raise RequestError("logprob_token_ids needs logprobs.", "logprob_token_ids")
    if sampling.allowed_token_ids is not None and not len(sampling.allowed_token_ids):
        raise RequestError("allowed_token_ids must name at least one token.", "allowed_token_ids")
    for word in sampling.bad_words:
        check_ids(word, vocab_size, "bad_words")
    if not isinstance(sampling.grammar, Grammar | None):
        raise RequestError("grammar must be one that ruvon.grammars makes.", "grammar")


def check_length(num_prompt: int, max_tokens: int | None, limit: int, param: str) -> None:
    """Raises ContextLengthError, in the words clients match on, if prompt and completion do not fit
    the context. Without ``max_tokens`` one token must fit."""
    start = f"This model's maximum context length is {limit} tokens. However, "
    if max_tokens is None and num_prompt >= limit:
        error = ContextLengthError(
            f"{start}your {param} resulted in {num_prompt} tokens."
            f" Please reduce the length of the {param}.",
            param,
        )
        error.too_many = (num_prompt, limit - 1)
        raise error
    if max_tokens is not None and num_prompt + max_tokens > limit:
        raise ContextLengthError(
            f"{start}you requested {num_prompt + max_tokens} tokens ({num_prompt} in the {param},"
            f" {max_tokens} in the completion)."
            f" Please reduce the length of the {param} or completion.",
            param,
        )


def check_number(name: str, value: object, least: float, most: float) -> None:
    """Raises RequestError for what is of another type, or not between the two."""
    if value is None and name in OPTIONAL:
        return
    kind, wanted = (Integral, "a whole number") if name in WHOLE else (Real, "a number")
    if isinstance(value, bool) or not isinstance(value, kind):
        raise RequestError(f"{name} must be {wanted}, not {value!r}.", name)
    if not (least <= value <= most and -math.inf < value < math.inf):  # type: ignore[operator]
        wanted = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise RequestError(f"{name} must be {wanted}, not {value}.", name)


def check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raises RequestError for what is no id, or one outside the vocabulary."""
    if not isinstance(ids, Iterable):
        raise RequestError(f"{param} must be a list of token ids, not {ids!r}.", param)
    for token in ids:
        is_whole = type(token) is int or isinstance(token, Integral)  # the first is quick to tell
        if not is_whole or not 0 <= token < vocab_size:
            raise RequestError(
                f"Token id {token!r} is not in the vocabulary of {vocab_size}.", param
            )
