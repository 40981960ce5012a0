"""OpenAI's answers, as types of the dictionaries that orjson writes.

Keys that are not always present are ``NotRequired``: clients test presence as well as truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypeAlias

from typing_extensions import TypedDict  # pydantic, which describes them, cannot read 3.11's own

PromptLogprobs: TypeAlias = "list[dict[str, PromptLogprob] | None]"


class PromptTokensDetails(TypedDict):
    cached_tokens: int
    audio_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(TypedDict):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class PromptLogprob(TypedDict):
    """How likely a prompt token, or one of its alternatives, was."""

    logprob: float
    rank: int
    decoded_token: str


class CompletionLogprobs(TypedDict):
    """Four lists side by side, one entry for each token; the first prompt token has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One completion, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[Sequence[int]]
    prompt_token_ids: NotRequired[Sequence[int]]
    prompt_text: NotRequired[str]
    prompt_logprobs: NotRequired[PromptLogprobs]


class TopLogprob(TypedDict):
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class FunctionCall(TypedDict):
    name: NotRequired[str]  # with a call's first piece only
    arguments: str


class CustomCall(TypedDict):
    name: NotRequired[str]
    input: str


class ChatToolCall(TypedDict, total=False):
    """A call, or a piece of one: then with ``index``, and with id, type and name in the first."""

    index: int
    id: str
    type: Literal["function", "custom"]
    function: FunctionCall
    custom: CustomCall


class ChatMessage(TypedDict):
    """An assistant's answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    annotations: list[Any]
    tool_calls: NotRequired[list[ChatToolCall]]
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]  # the same text under the name older clients read


class ChatDelta(TypedDict, total=False):
    """What a chunk adds to an assistant's answer."""

    role: Literal["assistant"]
    content: str
    reasoning: str
    reasoning_content: str
    tool_calls: list[ChatToolCall]


class ChatChoice(TypedDict):
    """One answer, whole."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[Sequence[int]]


class ChatChunkChoice(TypedDict):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[Sequence[int]]


class ErrorBody(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(TypedDict):
    """OpenAI's nested error."""

    error: ErrorBody


class AnthropicErrorDetails(TypedDict):
    error_code: str | None


class AnthropicErrorBody(TypedDict):
    type: str
    message: str
    details: AnthropicErrorDetails


class AnthropicErrorAnswer(TypedDict):
    """Anthropic's error."""

    type: Literal["error"]
    error: AnthropicErrorBody
    request_id: str | None


class OllamaErrorAnswer(TypedDict):
    """Ollama's error."""

    error: str


class Timings(TypedDict):
    """How long a completion took, of several the last one: llama.cpp's names, and ours."""

    cache_n: int  # prompt tokens that were cached
    prompt_n: int  # and those that were not
    prompt_ms: float  # from the first step to the first token
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float  # from the first token to the last
    predicted_per_token_ms: float
    predicted_per_second: float
    queue_ms: float  # before the first step
    total_ms: float


class Answer(TypedDict):
    """What chat and completions say beside their choices."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    prompt_token_ids: NotRequired[Sequence[int]]
    prompt_text: NotRequired[str]
    prompt_logprobs: NotRequired[PromptLogprobs]
    timings: NotRequired[Timings]


class ChatAnswer(Answer):
    """A whole answer to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    service_tier: str
    metadata: NotRequired[Mapping[str, str]]


class TextAnswer(Answer):
    """Whole completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class InputTokensDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Token counts of decisions and of responses."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
