"""Anthropic's requests, as pydantic models.

As in `ruvon.server.schemas`: strict types, ``null`` is "not given", strangers are kept aside to be
reported. Blocks and tools that only Anthropic's own servers understand are `Foreign`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from ruvon.errors import RequestError
from ruvon.server.schemas.base import Fields, Int, Stops, Timeout, as_parts
from ruvon.server.schemas.tools import ToolName

MAX_TOOLS = 1024
UNREADABLE = frozenset({"image", "document", "search_result", "container_upload", "compaction"})
"""Blocks with content that the model would miss."""


def check_block(value: object) -> object:
    """A block says of what type it is, and that this is none we cannot read."""
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str):
        raise PydanticCustomError("block_type", "Input should be an object with a type")
    if kind in UNREADABLE:
        raise PydanticCustomError(
            "unreadable_block", "{kind} blocks are not supported by this server", {"kind": kind}
        )
    return value


class Foreign(Fields):
    """A block or a tool of Anthropic's servers: left out, and reported by its type."""

    model_config = ConfigDict(extra="ignore")

    type: str


class Block(Fields):
    """What all blocks may have. Prefixes are cached wherever they end, so ``cache_control`` is
    obeyed by doing nothing."""

    cache_control: dict[str, Any] | None = None


class TextBlock(Block):
    """Text, in any role."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Block):
    """What the assistant has thought."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Block):
    """A call that the assistant has made."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)]
    input: dict[str, Any]


def result_kind(value: object) -> str:
    """The tag of a block. Tags are in angle brackets, so that errors can leave them out."""
    return "<text>" if isinstance(value, dict) and value.get("type") == "text" else "<foreign>"


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[Foreign, Tag("<foreign>")],
    Discriminator(result_kind),
    BeforeValidator(check_block),
]
ResultBlocks = Annotated[
    list[ResultBlock], Field(fail_fast=True, max_length=1024), BeforeValidator(as_parts)
]


class ToolResultBlock(Block):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: ResultBlocks | None = None
    is_error: bool | None = None


KINDS = ("text", "thinking", "tool_use", "tool_result")


def block_kind(value: object) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    return f"<{kind}>" if kind in KINDS else "<foreign>"


ContentBlock = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[Foreign, Tag("<foreign>")],
    Discriminator(block_kind),
    BeforeValidator(check_block),
]
Blocks = Annotated[
    list[ContentBlock], Field(fail_fast=True, max_length=1024), BeforeValidator(as_parts)
]
SystemBlocks = Annotated[
    list[TextBlock], Field(fail_fast=True, max_length=1024), BeforeValidator(as_parts)
]


class Message(Fields):
    """One turn, or a part of one: neighbours of the same role are one turn."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class ToolParam(Fields):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None


def tool_kind(value: object) -> str:
    """A tool of another type is foreign, unless it says itself what its input is."""
    kind = value.get("type") if isinstance(value, dict) else None
    return "<foreign>" if isinstance(kind, str) and kind != "custom" else "<custom>"


AnyTool = Annotated[
    Annotated[ToolParam, Tag("<custom>")] | Annotated[Foreign, Tag("<foreign>")],
    Discriminator(tool_kind),
]


class ToolChoiceParam(Fields):
    """``tool_choice``."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingParam(Fields):
    """``thinking``. Progress notes between tools are text here, so ``between_tools`` turns
    thinking off as ``disabled`` does."""

    type: Literal["enabled", "adaptive", "disabled", "between_tools"]
    budget_tokens: Annotated[Int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> ThinkingParam:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            need = "is needed with" if self.type == "enabled" else "goes only with"
            raise RequestError(
                f"thinking.budget_tokens {need} type enabled.", "thinking.budget_tokens"
            )
        return self


class OutputFormat(Fields):
    """``output_config.format``."""

    type: Literal["json_schema"]
    # "schema" is a method of every pydantic model
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Fields):
    """``output_config``."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class PromptFields(Fields):
    """What becomes the prompt, and what ``count_tokens`` counts."""

    UNSERVED: ClassVar[frozenset[str]] = frozenset({"compaction", "mcp_servers"})
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        {
            "billing_policy", "container", "context_management", "diagnostics",
            "fallback_credit_token", "fallbacks", "inference_geo", "metadata", "speed",
            "user_profile_id", "workspace_id",
        }
    )  # fmt: skip

    model: str | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    system: SystemBlocks | None = None
    tools: Annotated[list[AnyTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceParam | None = None
    thinking: ThinkingParam | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # where it was before output_config
    cache_control: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_thread(self) -> PromptFields:
        if (self.model_extra or {}).get("thread") is not None:
            raise RequestError(
                "This server keeps no conversations: send all of it, without 'thread'.",
                "thread",
                "thread_unsupported_request",
            )
        return self


class MessagesRequest(PromptFields):
    """``POST /v1/messages``."""

    max_tokens: Annotated[Int, Field(ge=0)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1)] | None = None
    stop_sequences: Stops | None = None
    timeout: Timeout | None = None  # ours

    @model_validator(mode="after")
    def _check_lengths(self) -> MessagesRequest:
        budget = self.thinking and self.thinking.budget_tokens
        if budget and budget >= self.max_tokens:
            raise RequestError(
                "max_tokens must be greater than thinking.budget_tokens.", "max_tokens"
            )
        return self


class CountRequest(PromptFields):
    """``POST /v1/messages/count_tokens``."""
