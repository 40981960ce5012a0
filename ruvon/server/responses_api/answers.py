"""Answers of the Responses API, as types of the dictionaries that orjson writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypeAlias

from typing_extensions import TypedDict  # pydantic, which describes them, cannot read 3.11's own

from ruvon.server.responses import ResponseUsage, TokenLogprob

Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class TextPiece(TypedDict):
    """A part of anything else."""

    type: Literal["input_text", "summary_text", "reasoning_text"]
    text: str


class MessageOutput(TypedDict):
    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class ReasoningOutput(TypedDict):
    id: str
    type: Literal["reasoning"]
    status: Status
    summary: list[TextPiece]
    content: list[TextPiece]
    encrypted_content: NotRequired[str]


class FunctionCallOutput(TypedDict):
    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str
    namespace: NotRequired[str]


class CustomToolCallOutput(TypedDict):
    id: str
    type: Literal["custom_tool_call"]
    status: Status
    call_id: str
    name: str
    input: str
    namespace: NotRequired[str]


OutputItem: TypeAlias = MessageOutput | ReasoningOutput | FunctionCallOutput | CustomToolCallOutput


class ResponseError(TypedDict):
    code: str
    message: str


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ReasoningTold(TypedDict):
    effort: str | None
    summary: str | None


class ResponseAnswer(TypedDict):
    """A response."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    background: bool
    frequency_penalty: float
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: Mapping[str, str]
    model: str
    parallel_tool_calls: bool
    presence_penalty: float
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningTold
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: Mapping[str, Any]
    tool_choice: str | Mapping[str, Any]
    tools: list[Mapping[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None
    output: list[OutputItem]
    usage: ResponseUsage | None


class Deleted(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItemList(TypedDict):
    """Items that a response answers."""

    object: Literal["list"]
    data: list[Mapping[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: int


class CompactAnswer(TypedDict):
    """A conversation in short."""

    id: str
    object: Literal["response.compaction"]
    created_at: int
    output: list[Mapping[str, Any]]
    usage: ResponseUsage
