"""What became of the requests, and where two answers to one differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, TypeAlias

from ruvon.engine.types import Emission, TokenLogprobs
from ruvon.errors import RuvonError
from ruvon.models.tokenizer import Tokenizer

Place: TypeAlias = Literal["output", "prompt"]


@dataclass(slots=True)
class Answer:
    """What became of one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # if asked for
    prompt_logprobs: Sequence[TokenLogprobs | None] = ()  # if asked for

    def take(self, emission: Emission) -> None:
        if emission.error is not None:
            raise RuvonError(f"a request failed: {emission.error}")
        self.tokens += emission.tokens
        self.logprobs += emission.logprobs or ()
        self.prompt_logprobs = self.prompt_logprobs or emission.prompt_logprobs or ()


@dataclass(slots=True)
class Outcome:
    """Answers, and what happened on the way."""

    answers: dict[int, Answer]  # by request
    preempted: int = 0  # sequences
    cached: int = 0  # prompt tokens

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers.values())

    @property
    def fingerprint(self) -> str:
        """Stands for every bit of the answers: compare it between runs, builds and machines."""
        return hashlib.blake2b(repr(self.answers).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where an answer is not what it was alone."""

    request: int
    where: Place
    position: int
    expected: int | TokenLogprobs | None  # a token id; with log-probabilities if only they differ
    found: int | TokenLogprobs | None  # None where an answer ended before the other

    def describe(self, tokenizer: Tokenizer) -> str:
        place = f"request {self.request}, {self.where} position {self.position}"
        if isinstance(self.expected, TokenLogprobs) and isinstance(self.found, TokenLogprobs):
            token = spell(self.expected.token, tokenizer)
            return f"{place}: {token} in both, {contrast(self.expected, self.found)}"
        alone, here = spell(self.expected, tokenizer), spell(self.found, tokenizer)
        return f"{place}: {alone} alone, {here} here"


def contrast(one: TokenLogprobs, other: TokenLogprobs) -> str:
    """Where two positions with the same token differ, to the last digit."""
    if one.logprob != other.logprob:
        return f"log-probability {one.logprob!r} alone, {other.logprob!r} here"
    return f"alternatives {one.top} alone, {other.top} here"


def spell(value: int | TokenLogprobs | None, tokenizer: Tokenizer) -> str:
    """A token with its text."""
    if value is None:
        return "nothing"
    token = value.token if isinstance(value, TokenLogprobs) else value
    return f"token {token} {tokenizer.token_text(token)!r}"


def find_difference(
    expected: Mapping[int, Answer], found: Mapping[int, Answer]
) -> Difference | None:
    """The first one, tokens before log-probabilities within each request."""
    for number, other in found.items():
        one = expected[number]
        pairs: list[tuple[Place, Sequence[Any], Sequence[Any]]] = [
            ("output", one.tokens, other.tokens),
            ("output", one.logprobs, other.logprobs),
            ("prompt", one.prompt_logprobs, other.prompt_logprobs),
        ]
        for place, mine, theirs in pairs:
            for at, (a, b) in enumerate(zip_longest(mine, theirs)):
                if a != b:
                    return Difference(number, place, at, a, b)
    return None
