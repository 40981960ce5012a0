"""Requests of the Responses API, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from ruvon.errors import RequestError
from ruvon.server.fields import EMPTY
from ruvon.server.responses_api.input import Items
from ruvon.server.schemas import ConstraintFields, Fields, SamplingFields
from ruvon.server.schemas.base import Int, Timeout, missing
from ruvon.server.schemas.chat import Effort, Metadata

MAX_TOOLS = 1024


class FunctionTool(Fields):
    """A function, with a JSON schema for its arguments."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomFormat(Fields):
    """What the input of a custom tool must look like."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = None

    @model_validator(mode="after")
    def _check_grammar(self) -> CustomFormat:
        if self.type == "grammar" and (self.syntax is None or self.definition is None):
            raise PydanticCustomError("grammar", "A grammar needs a syntax and a definition")
        return self


class CustomTool(Fields):
    """A tool that is called with text."""

    type: Literal["custom"]
    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    format: CustomFormat | None = None


class OtherTool(Fields):
    """A tool that others run, and that is not served."""

    model_config = ConfigDict(extra="ignore")

    type: str


def kind_of(value: Any) -> str:
    """The tag of a tool. Tags are in angle brackets, so that errors can leave them out."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("function", "custom", "namespace") else "<other>"


NamedTool: TypeAlias = Annotated[
    Annotated[FunctionTool, Tag("<function>")]
    | Annotated[CustomTool, Tag("<custom>")]
    | Annotated[OtherTool, Tag("<other>")],
    Discriminator(kind_of),
]


class NamespaceTool(Fields):
    """A group of tools, whose names are unique among themselves only."""

    type: Literal["namespace"]
    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    tools: Annotated[list[NamedTool], Field(fail_fast=True, max_length=MAX_TOOLS)]


AnyTool: TypeAlias = Annotated[
    Annotated[FunctionTool, Tag("<function>")]
    | Annotated[CustomTool, Tag("<custom>")]
    | Annotated[NamespaceTool, Tag("<namespace>")]
    | Annotated[OtherTool, Tag("<other>")],
    Discriminator(kind_of),
]
Tools = Annotated[list[AnyTool], Field(fail_fast=True, max_length=MAX_TOOLS)]


class AllowedTool(Fields):
    """A tool by name, or one that is not served by its type."""

    type: str
    name: str | None = None
    namespace: str | None = None


class Choice(AllowedTool):
    """``tool_choice`` as an object: one tool, or the ``allowed_tools``."""

    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[AllowedTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None


ToolChoiceField: TypeAlias = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[Choice, Tag("<choice>")],
    Discriminator(lambda value: "<choice>" if isinstance(value, dict | Choice) else "<mode>"),
]


class TextFormat(Fields):
    """What the answer's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise missing("text.format.schema")
        return self


class TextFields(Fields):
    """``text``."""

    format: TextFormat | None = None


class ReasoningFields(Fields):
    """``reasoning``."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None  # its old name


MOVED = {
    "conversation": "previous_response_id",
    "prompt": "input",
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "logprobs": "top_logprobs",
    "n": None,
    "echo": None,
    "prompt_logprobs": None,
    "functions": "tools",
    "function_call": "tool_choice",
    "truncate_prompt_tokens": "truncation",
    "thinking_budget": "thinking_token_budget",
    "reasoning_budget": "thinking_token_budget",
    "include_reasoning": None,
    "continue_final_message": None,
    "add_generation_prompt": None,
    "return_token_ids": None,
    "return_prompt_text": None,
}
"""What would change the answer and is not served: chat's fields, and what OpenAI keeps for its
clients → the field that says the same, if there is one."""

NEUTRAL = {
    "n": 1,
    "include_reasoning": True,
    "add_generation_prompt": True,
    "thinking_budget": -1,
    "reasoning_budget": -1,
}


def asks(name: str, value: object) -> bool:
    """Whether a value of one of `MOVED` asks for anything."""
    neutral = NEUTRAL.get(name, False)
    return value not in EMPTY and (type(value), value) != (type(neutral), neutral)


class ContextFields(Fields):
    """What makes the prompt."""

    model: str | None = None
    input: Items | None = None
    instructions: str | None = None
    previous_response_id: str | None = None

    @model_validator(mode="after")
    def _check_context(self) -> ContextFields:
        for name, value in (self.model_extra or {}).items():
            if name in MOVED and asks(name, value):
                instead = f"; use {MOVED[name]}" if MOVED[name] else ""
                raise RequestError(
                    f"'{name}' is not a parameter of this API{instead}.",
                    name,
                    "unsupported_parameter",
                )
        if self.input is None and self.previous_response_id is None:
            raise missing("input")
        return self


class TurnFields(ContextFields):
    """What makes the prompt and the form of the answer."""

    tools: Tools | None = None
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool | None = None
    text: TextFields | None = None
    reasoning: ReasoningFields | None = None
    truncation: Literal["auto", "disabled"] | None = None
    # chat's extensions
    enable_thinking: bool | None = None
    thinking_token_budget: Annotated[Int, Field(ge=-1)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


Label = Annotated[str, Field(max_length=512)]


class ResponsesRequest(TurnFields, SamplingFields, ConstraintFields):
    """``POST /v1/responses``."""

    max_output_tokens: Annotated[Int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[Int, Field(ge=1)] | None = None
    include: Annotated[list[str], Field(max_length=64)] | None = None
    top_logprobs: Annotated[Int, Field(ge=0)] | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: Fields | None = None  # nothing of it has an effect; usage is always told
    background: bool | None = None
    prompt_cache_key: Label | None = None
    safety_identifier: Label | None = None
    user: Label | None = None
    timeout: Timeout | None = None  # ours

    @model_validator(mode="after")
    def _check_background(self) -> ResponsesRequest:
        if self.background and self.store is False:
            raise RequestError("background needs store: true.", "background")
        return self


class InputTokensRequest(TurnFields):
    """``POST /v1/responses/input_tokens``."""


class CompactRequest(ContextFields):
    """``POST /v1/responses/compact``."""
