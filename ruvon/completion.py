"""What `LLM` and `AsyncLLM` share: prompts and jobs going in, completions coming out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, TypeAlias, Unpack

import structlog

from ruvon.deltas import Delta, FinishReason, TokenLogprobs, ToolCall
from ruvon.engine.types import Job, SamplingParams, TextOptions
from ruvon.engine.validation import check_type
from ruvon.errors import RequestError
from ruvon.models.chat import Chat, TurnOptions
from ruvon.models.formats.tools import (
    Reasoning,
    Tool,
    ToolChoice,
    Turn,
    read_choice,
    read_tools,
)
from ruvon.models.tokenizer import Tokenizer

log = structlog.get_logger(__name__)

Prompt: TypeAlias = str | Sequence[int]
Conversation: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages as the OpenAI API has them: role, content ..."""

PLAIN_TEXT = TextOptions()


class ChatOptions(TurnOptions, total=False):
    """What a chat may be given besides messages: tools and the choice among them, in OpenAI's form
    or as `Tool`s and a `ToolChoice`, and how to reason."""

    tools: Sequence[Tool | Mapping[str, Any]] | None
    tool_choice: ToolChoice | str | Mapping[str, Any]
    reasoning: Reasoning


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of one prompt."""

    index: int  # among the prompt's n
    text: str
    reasoning: str  # what a chat's answer says to itself, if the model's format has that
    tool_calls: tuple[ToolCall, ...]  # whole, in their order
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
    calls: list[ToolCall] = field(default_factory=list)
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
        if delta.tool_call is not None:
            self._call(delta.tool_call)
        if delta.logprobs:
            self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = tuple(delta.prompt_logprobs)
        if delta.num_cached:
            self.num_cached = delta.num_cached
        if delta.finish is not None:
            self.end = delta

    def _call(self, piece: ToolCall) -> None:
        if piece.index == len(self.calls):
            self.calls.append(piece)
        else:
            whole = self.calls[piece.index]
            arguments = whole.arguments + piece.arguments
            self.calls[piece.index] = replace(whole, arguments=arguments)

    def completion(self) -> Completion:
        end = self.end
        assert end is not None
        assert end.finish is not None
        return Completion(
            index=self.index,
            text=self.text,
            reasoning=self.reasoning,
            tool_calls=tuple(self.calls),
            tokens=tuple(self.tokens),
            finish_reason=end.finish,
            stop_reason=end.stop_reason,
            error=end.error,
            logprobs=None if self.job.sampling.logprobs is None else tuple(self.logprobs),
            prompt_logprobs=self.prompt_logprobs,
            num_prompt=len(self.job.prompt),
            num_cached=self.num_cached,
        )


def take_turn(
    chat: Chat,
    messages: Conversation,
    sampling: SamplingParams,
    *,
    tools: Sequence[Tool | Mapping[str, Any]] | None = None,
    tool_choice: ToolChoice | str | Mapping[str, Any] = "auto",
    reasoning: Reasoning | None = None,
    **template: Unpack[TurnOptions],
) -> tuple[Turn, SamplingParams]:
    """The answer to be given, and how to sample it; a grammar in ``sampling`` is the form of what
    is no call. Raises RequestError."""
    check_messages(messages)
    check_type(sampling)
    turn = chat.turn(
        messages,
        tools=read_tools(tools or ()),
        choice=read_choice(tool_choice),
        response=sampling.grammar,
        reasoning=reasoning,
        **template,
    )
    if turn.ignored:
        log.warning("without_effect", wishes=turn.ignored)  # the model's template knows none of it
    return turn, replace(sampling, grammar=turn.grammar)


def read_ids(prompt: Any) -> list[int]:
    """Token ids that somebody has given, such as numpy's. Raises RequestError for what is none:
    bytes, too, would pass as a list of numbers."""
    listed = isinstance(prompt, Iterable) and not isinstance(prompt, bytes | bytearray)
    ids = list(prompt) if listed else [prompt]
    if not listed or not all(isinstance(id, Integral) for id in ids):
        raise RequestError(f"a prompt must be a text or token ids, not {prompt!r:.100}", "prompt")
    return [int(id) for id in ids]


def check_messages(messages: Any) -> None:
    """Raises RequestError for what is no conversation."""
    listed = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not listed or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError(
            f"messages must be a list of dicts with role and content, not {messages!r:.100}",
            "messages",
        )


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer) -> Sequence[int]:
    """A prompt as ids. Nothing at all means: begin a document. Raises RequestError."""
    if not isinstance(prompt, str):
        return read_ids(prompt)
    start = tokenizer.bos_id
    return tokenizer.encode(prompt) or ([] if start is None else [start])
