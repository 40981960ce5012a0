"""OpenAI's requests, as pydantic models.

Types are strict (``"1"`` is not a number) and ``null`` means "not given", as OpenAI has it. What is
not declared here is kept offload, for `parsing` to refuse or to report.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ruvon.errors import RequestError

INT64 = 2**63

MAX_BIASES = 1024  # as many as vLLM takes, like the 128 ids that stop
MAX_PROMPTS = 256
MAX_FIELDS = 256  # of one object


def as_list(value: object) -> object:
    """``"x"`` → ``["x"]``."""
    return [value] if isinstance(value, str) else value


def as_parts(value: object) -> object:
    """``"x"`` → ``[{"type": "text", "text": "x"}]``; parts stay parts."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if isinstance(value, list):
        return value
    raise PydanticCustomError("content_type", "Input should be a string or a list of text parts")


def as_prompts(value: object) -> list[str | list[int]]:
    """The four shapes of ``prompt`` → a list with one string or one list of token ids for each."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise PydanticCustomError("too_long", f"There should be at most {MAX_PROMPTS} prompts")
        if all(isinstance(item, str) or is_ids(item) for item in value):
            return value
    raise PydanticCustomError(
        "prompt_type",
        "Input should be a string, a list of strings, a list of token ids, or a list of such lists,"
        " and not empty",
    )


def is_ids(value: object) -> bool:
    """Whether this is a non-empty list of integers (``True`` is none)."""
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def as_bias(value: object) -> dict[int, float]:
    """``{"50256": -100}`` → ``{50256: -100.0}``."""
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "Input should be a map from token ids to numbers")
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("too_long", f"There should be at most {MAX_BIASES} entries")
    bias = {}
    for key, number in value.items():
        if not (key.isascii() and key.isdigit()) or len(key) > 10:
            raise PydanticCustomError("bias_key", "Keys should be token ids, as strings of digits")
        if type(number) not in (int, float) or not -100 <= number <= 100:
            raise PydanticCustomError("bias_value", "Values should be numbers from -100 to 100")
        bias[int(key)] = float(number)
    return bias


Text = Annotated[str, Field(min_length=1, max_length=1024)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(
        as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]
Bias = Annotated[dict[int, float], PlainValidator(as_bias, json_schema_input_type=dict[str, float])]
Word = Annotated[str, Field(min_length=1, max_length=128)]
Texts = Annotated[list[Word], Field(fail_fast=True, max_length=256)]
Stops = Annotated[
    list[Text],
    Field(fail_fast=True, max_length=64),
    BeforeValidator(as_list, json_schema_input_type=Text | list[Text]),
]


class Fields(BaseModel):
    """What all our models have in common: strict types, finite numbers, strangers kept aside."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    HARMLESS: ClassVar[frozenset[str]] = frozenset()
    """Of one API's clients: fields without effect here, as in `fields`."""

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise PydanticCustomError("too_long", f"There should be at most {MAX_FIELDS} fields")
        return data


class StreamOptions(Fields):
    """``stream_options``."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(Fields):
    """How tokens are drawn, and when they end: the same words in every API."""

    # OpenAI's
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Bias | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Stops | None = None
    # the usual extensions, under vLLM's names
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=128)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: Texts | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    priority: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class GenerationFields(SamplingFields):
    """What completions and chat share besides: what is sent, and how."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    return_token_ids: bool | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true.", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs cannot be streamed.", "prompt_logprobs")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(GenerationFields):
    """``POST /v1/completions``."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        n, best_of = self.n or 1, self.best_of or self.n or 1
        if best_of < n:
            raise RequestError(f"best_of must not be less than n, which is {n}.", "best_of")
        if best_of > n and self.stream:
            raise RequestError("best_of greater than n cannot be streamed.", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens may be 0 only with echo.", "max_tokens")
        return self


class TextPart(Fields):
    """One part of a message's content; images and sounds are not served."""

    type: Literal["text"]
    text: str


Parts = Annotated[
    list[TextPart],
    Field(fail_fast=True, max_length=1024),
    BeforeValidator(as_parts, json_schema_input_type=str | list[TextPart]),
]


class FunctionCall(Fields):
    """The function a past assistant message called; ``arguments`` is JSON in a string."""

    name: str
    arguments: str


class ToolCall(Fields):
    """A tool call in a past assistant message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Fields):
    """One message of a chat, of any role."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Parts | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=128)] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @property
    def text(self) -> str:
        """The content as one string, parts on lines of their own."""
        return "\n".join(part.text for part in self.content or ())

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                call.model_dump(include={"id", "type", "function"}) for call in self.tool_calls
            ]
        reasoning = self.reasoning or self.reasoning_content
        if reasoning:
            message["reasoning_content"] = reasoning
        return message


class TemplateFields(Fields):
    """How messages become a prompt."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=4096)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_contents(self) -> TemplateFields:
        for index, message in enumerate(self.messages):
            calls = message.role == "assistant" and message.tool_calls
            if message.content is None and not calls:
                raise RequestError(
                    f"A message of role {message.role} needs content.",
                    f"messages[{index}].content",
                    "missing_required_parameter",
                )
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

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true.", "top_logprobs")
        return self


class TokenizeRequest(Fields):
    """``POST /tokenize`` with a prompt."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(TemplateFields):
    """``POST /tokenize`` with messages."""

    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Fields):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: TokenIds
