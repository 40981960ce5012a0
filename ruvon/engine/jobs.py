"""Jobs: which of them can run, and the sequences that they become."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from itertools import count

from ruvon.engine.types import Job, SamplingParams, Sequence
from ruvon.engine.validation import check_length, check_sampling, normalize
from ruvon.errors import RequestError
from ruvon.grammars import Grammar

SEED_BITS = 63  # a seed fits a signed 64-bit integer, so it can be a tensor's element


class Jobs:
    """What one engine can run. Lengths are in tokens."""

    def __init__(
        self,
        *,
        max_model_len: int,
        vocab_size: int,
        most_live: int,
        eos_token_ids: Iterable[int],
        has_grammars: bool,
    ) -> None:
        """``most_live`` sequences run or wait at once, whatever comes."""
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._most_live = most_live
        self._eos_token_ids = frozenset(eos_token_ids)
        self._has_grammars = has_grammars
        self._ids = count()
        self._valid: SamplingParams | None = None  # the last that was checked

    def validate(self, job: Job) -> int:
        """The job's ``max_tokens``, resolved; `RequestError` if it could never run."""
        if not job.checked:
            self._check(job)
        max_tokens = job.sampling.max_tokens
        return self._max_model_len - len(job.prompt) if max_tokens is None else max_tokens

    def _check(self, job: Job) -> None:
        if not 1 <= job.n <= self._most_live:
            raise RequestError(f"n must be from 1 to {self._most_live} here, not {job.n}.", "n")
        if not job.prompt:
            raise RequestError("The prompt is empty.", job.param)
        if job.pooling is not None and job.sampling.max_tokens != 0:
            raise RequestError("Pooling goes with max_tokens 0.", "max_tokens")
        lowest, highest = min(job.prompt), max(job.prompt)
        if lowest < 0 or highest >= self._vocab_size:
            raise RequestError(
                f"Token id {lowest if lowest < 0 else highest} is not in the vocabulary of "
                f"{self._vocab_size}.",
                job.param,
            )
        if job.sampling is not self._valid:  # a request's jobs share theirs
            check_sampling(job.sampling, self._vocab_size)
            self._check_grammar(job.sampling.grammar)
            self._valid = job.sampling
        check_length(len(job.prompt), job.sampling.max_tokens, self._max_model_len, job.param)

    def _check_grammar(self, grammar: Grammar | None) -> None:
        """Raises `RequestError` for one where none can be had."""
        if grammar is not None and not self._has_grammars:
            raise RequestError("This engine has no grammars.", grammar.param)

    def sequences(self, job: Job, now: float, first_index: int) -> list[Sequence]:
        """The job's ``n``, whose emissions carry ``first_index`` and up. Raises as `validate`."""
        max_tokens = self.validate(job)
        seeds = completion_seeds(job)
        stop_ids = self._stop_ids(job.sampling)
        sampling = normalize(job.sampling)
        return [
            Sequence(
                id=next(self._ids),
                index=first_index + k,
                sampling=sampling,
                tokens=list(job.prompt),
                num_prompt=len(job.prompt),
                max_tokens=max_tokens,
                seed=next(seeds),
                stop_ids=stop_ids,
                priority=job.priority,
                tenant=job.tenant,
                weight=job.weight,
                salt=job.cache_salt,
                arrived_at=now,
                keys=list(job.keys),
                prompt_logprobs=None if job.sampling.prompt_logprobs is None else [None],
                pooling=job.pooling,
                held=job.held,
            )
            for k in range(job.n)
        ]

    def _stop_ids(self, sampling: SamplingParams) -> frozenset[int]:
        if sampling.ignore_eos:
            return frozenset(sampling.stop_token_ids)
        return self._eos_token_ids.union(sampling.stop_token_ids)


def completion_seeds(job: Job) -> Iterator[int]:
    """A seed for each completion: the request's own for the first, then strides from it."""
    seed = job.sampling.seed
    if seed is None:
        seed = secrets.randbits(SEED_BITS)
    stride = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio: far apart, never repeating
    return ((seed + k * stride) % 2**SEED_BITS for k in count())
