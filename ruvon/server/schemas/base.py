"""What all requests have in common, and the fields that say how tokens are drawn."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

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
    raise PydanticCustomError("content_type", "Input should be a string or a list of parts")


def as_bias(value: object) -> dict[int, float]:
    """``{"50256": -100}`` → ``{50256: -100.0}``, which stays as it is."""
    if not isinstance(value, dict):
        raise PydanticCustomError("dict_type", "Input should be a map from token ids to numbers")
    if len(value) > MAX_BIASES:
        raise PydanticCustomError("too_long", f"There should be at most {MAX_BIASES} entries")
    bias = {}
    for key, number in ((str(key), number) for key, number in value.items()):
        if not (key.isascii() and key.isdigit()) or len(key) > 10:
            raise PydanticCustomError("bias_key", "Keys should be token ids, as strings of digits")
        if type(number) not in (int, float) or not -100 <= number <= 100:
            raise PydanticCustomError("bias_value", "Values should be numbers from -100 to 100")
        bias[int(key)] = float(number)
    return bias


def as_int(value: object) -> object:
    """``5.0`` → ``5``: JSON has one kind of number, and some languages write all with a point."""
    whole = type(value) is float and value.is_integer() and -INT64 <= value < INT64
    return int(value) if whole else value  # type: ignore[call-overload]


Int = Annotated[int, BeforeValidator(as_int)]
Timeout = Annotated[float, Field(gt=0, le=86_400)]  # seconds
Text = Annotated[str, Field(min_length=1, max_length=1024)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
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

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, frozen=True, populate_by_name=True
    )
    HARMLESS: ClassVar[frozenset[str]] = frozenset()
    """Of one API's clients: fields without effect here, as in `fields`."""

    UNSERVED: ClassVar[frozenset[str]] = frozenset()
    """Fields of an object within a request that would change the answer and are not served."""

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, data: Any) -> Any:
        if isinstance(data, dict) and len(data) > MAX_FIELDS:
            raise PydanticCustomError("too_long", f"There should be at most {MAX_FIELDS} fields")
        return data


class SamplingFields(Fields):
    """How tokens are drawn, and when they end: the same words in every API."""

    # OpenAI's
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Bias | None = None
    seed: Annotated[Int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Stops | None = None
    # the usual extensions, under vLLM's names
    top_k: Annotated[Int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    min_tokens: Annotated[Int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=128)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    bad_words: Texts | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    priority: Annotated[Int, Field(ge=-INT64, lt=INT64)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None


def missing(param: str, message: str | None = None) -> RequestError:
    """A field that must be there."""
    return RequestError(
        message or f"Missing required parameter: '{param}'.", param, "missing_required_parameter"
    )
