"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ruvon.errors import RequestError
from ruvon.server.schemas.base import Fields, Int, missing
from ruvon.server.schemas.generation import GenerationFields
from ruvon.server.schemas.messages import Message
from ruvon.server.schemas.tools import ToolChoiceField, Tools

MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], MetadataValue], Field(max_length=16)
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ReasoningFormat = Literal["auto", "none", "raw", "deepseek", "parsed", "hidden"]


class TemplateFields(Fields):
    """How messages become a prompt."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    documents: Annotated[list[dict[str, Any]], Field(max_length=1024)] | None = None

    @model_validator(mode="after")
    def _check_contents(self) -> TemplateFields:
        for index, message in enumerate(self.messages):
            other = message.reasoning or message.reasoning_content or message.refusal
            silent = message.role == "assistant" and (message.tool_calls or other)
            if message.content is None and not silent:
                raise missing(
                    f"messages[{index}].content", f"A message of role {message.role} needs content."
                )
            for number, call in enumerate(message.tool_calls or ()):
                if getattr(call, call.type) is None:
                    raise missing(f"messages[{index}].tool_calls[{number}].{call.type}")
        return self

    @model_validator(mode="after")
    def _check_continuation(self) -> TemplateFields:
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise RequestError(
                "continue_final_message needs a last message of role assistant.",
                "continue_final_message",
            )
        return self


class ChatRequest(GenerationFields, TemplateFields):
    """``POST /v1/chat/completions``."""

    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0)] | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None
    # how much to think, and where to tell it
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    thinking_token_budget: Annotated[Int, Field(ge=-1)] | None = None
    thinking_budget: Annotated[Int, Field(ge=-1)] | None = None
    reasoning_budget: Annotated[Int, Field(ge=-1)] | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    reasoning_format: ReasoningFormat | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true.", "top_logprobs")
        return self
