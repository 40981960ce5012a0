"""What `LLM` and `AsyncLLM` share: prompts and jobs going in, completions coming out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ruvon.deltas import Delta, FinishReason, TokenLogprobs
from ruvon.engine.types import Job, TextOptions
from ruvon.models.tokenizer import Tokenizer

Prompt: TypeAlias = str | Sequence[int]
Conversation: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages as the OpenAI API has them: role, content ..."""

PLAIN_TEXT = TextOptions()


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of one prompt."""

    index: int  # among the prompt's n
    text: str
    reasoning: str  # what a chat's answer says to itself, if the model's format has that
    tokens: tuple[int, ...]  # all that were drawn, one that stopped it included
    finish_reason: FinishReason
    stop_reason: str | int | None  # the stop string or stop token id that ended it
    error: str | None  # why it failed, where finish_reason is "error"
    logprobs: tuple[TokenLogprobs, ...] | None  # one a token, if asked for
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None  # None for the first token
    num_prompt: int
    num_cached: int  # prompt tokens found in the prefix cache


class CompletionWriter:
    """Folds deltas into `Completion`s."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._parts = [_Parts(job, index) for job in jobs for index in range(job.n)]

    def feed(self, delta: Delta) -> None:
        self._parts[delta.index].feed(delta)

    def result(self) -> list[Completion]:
        """All completions, each of which has ended."""
        return [parts.completion() for parts in self._parts]


@dataclass(slots=True)
class _Parts:
    """One completion so far."""

    job: Job
    index: int
    text: str = ""
    reasoning: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    num_cached: int = 0
    end: Delta | None = None  # the delta that says why it ended

    def feed(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.tokens
        if delta.reasoning:
            self.reasoning += delta.reasoning
        if delta.logprobs:
            self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = tuple(delta.prompt_logprobs)
        if delta.num_cached:
            self.num_cached = delta.num_cached
        if delta.finish is not None:
            self.end = delta

    def completion(self) -> Completion:
        end = self.end
        assert end is not None
        assert end.finish is not None
        return Completion(
            index=self.index,
            text=self.text,
            reasoning=self.reasoning,
            tokens=tuple(self.tokens),
            finish_reason=end.finish,
            stop_reason=end.stop_reason,
            error=end.error,
            logprobs=None if self.job.sampling.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
            num_prompt=len(self.job.prompt),
            num_cached=self.num_cached,
        )


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer) -> Sequence[int]:
    """A prompt as ids. Nothing at all means: begin a document."""
    if not isinstance(prompt, str):
        return prompt
    start = tokenizer.bos_id
    return tokenizer.encode(prompt) or ([] if start is None else [start])
