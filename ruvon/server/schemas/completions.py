"""``POST /v1/completions``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from ruvon.errors import RequestError
from ruvon.server.schemas.base import Int
from ruvon.server.schemas.generation import GenerationFields

MAX_PROMPTS = 256


def as_prompts(value: object, most: int = MAX_PROMPTS) -> list[str | list[int]]:
    """The four shapes of ``prompt`` → a list with one string or one list of token ids for each."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if len(value) > most:
            raise PydanticCustomError("too_long", f"There should be at most {most} of them")
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


Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(
        as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]


class CompletionRequest(GenerationFields):
    """``POST /v1/completions``."""

    HARMLESS = frozenset({"metadata", "parallel_tool_calls", "reasoning_effort"})  # chat's

    prompt: Prompts
    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    logprobs: Annotated[Int, Field(ge=0)] | None = None
    best_of: Annotated[Int, Field(ge=1, le=128)] | None = None
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
