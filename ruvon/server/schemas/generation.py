"""What completions and chat have in common besides how tokens are drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ruvon.errors import RequestError
from ruvon.server.schemas.base import Fields, Int, SamplingFields, Timeout, TokenIds
from ruvon.server.schemas.constraints import ConstraintFields

RequestId = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")]


class StreamOptions(Fields):
    """``stream_options``."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationFields(SamplingFields, ConstraintFields):
    """What completions and chat share besides: what is sent, and how."""

    model: str | None = None
    n: Annotated[Int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[Int, Field(ge=0)] | None = None
    logprob_token_ids: Annotated[TokenIds, Field(min_length=1, max_length=128)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_prompt_text: bool | None = None
    echo: bool | None = None
    truncate_prompt_tokens: Annotated[Int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    request_id: RequestId | None = None
    timeout: Timeout | None = None
    timings: bool | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> GenerationFields:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true.", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs cannot be streamed.", "prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _check_truncation(self) -> GenerationFields:
        if self.truncate_prompt_tokens == 0:
            raise RequestError(
                "truncate_prompt_tokens must be at least 1, or -1 for all that the context holds.",
                "truncate_prompt_tokens",
            )
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise RequestError("truncation_side needs truncate_prompt_tokens.", "truncation_side")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)
