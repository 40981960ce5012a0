"""From bytes to a request, or to one bounded sentence about what is wrong with it.

A field that ruvon cannot honour yet is refused (`UNSERVED`); a field that changes nothing here, or
that nobody knows, is reported back by name, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ruvon.errors import RequestError
from ruvon.server.schemas import Fields

MAX_IGNORED = 32  # names reported back
MAX_MESSAGE = 400  # characters of a validation message: a small request must not get a huge answer

UNSERVED: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "chat_template": (),
    "documents": (),
    "function_call": ("none",),
    "functions": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "json_schema": (),
    "length_penalty": (1.0,),
    "logprob_token_ids": (),
    "logits_processors": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "moderation": (),
    "prompt_embeds": (),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": (),
    "thinking_token_budget": (),
    "tool_choice": ("none",),
    "tools": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Fields that would change the answer but are not served: name → values that ask for nothing."""

HARMLESS = frozenset(
    {
        "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier", "store",
        "stream_options.include_obfuscation", "user", "verbosity",
    }
)  # fmt: skip
"""OpenAI's own fields that have no effect here: reported, and accepted even when strict."""

EMPTY: tuple[object, ...] = (None, "", [], {})

R = TypeVar("R", bound=Fields)


def parse(kind: type[R], body: bytes, strict: bool = False) -> tuple[R, list[str]]:
    """A request's body → the request, and the names of fields that have no effect.

    Raises RequestError for bad JSON, a wrong field, a field that is not served and, when
    ``strict``, for an unknown one.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise explain(error) from None
    refuse_unserved(request)
    ignored = list(unused(request))[:MAX_IGNORED]
    for name in ignored if strict else ():
        if name not in HARMLESS:
            raise RequestError(f"Unknown parameter: '{name}'.", name, "unknown_parameter")
    return request, ignored


def refuse_unserved(request: Fields) -> None:
    """Raise for a field that would change the answer and that ruvon does not serve."""
    for name, value in (request.model_extra or {}).items():
        if name in UNSERVED and value not in EMPTY and value not in UNSERVED[name]:
            raise RequestError(
                f"'{name[:64]}' is not supported by this server.", name, "unsupported_parameter"
            )


def unused(model: Fields, prefix: str = "") -> Iterator[str]:
    """Names of given fields that no model declares, such as ``messages[0].weight``."""
    for name, value in (model.model_extra or {}).items():
        if value not in EMPTY and name not in UNSERVED:
            yield f"{prefix}{name}"[:100]
    for name in model.model_fields_set:
        value = getattr(model, name, None)
        if isinstance(value, Fields):
            yield from unused(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Fields):
            for index, item in enumerate(value):
                yield from unused(item, f"{prefix}{name}[{index}].")


def explain(error: ValidationError) -> RequestError:
    """Pydantic's findings → one bounded sentence that names the first field, in OpenAI's words."""
    details = error.errors(include_url=False, include_input=False, include_context=False)
    first = details[0]
    message = first["msg"][:MAX_MESSAGE]
    if first["type"] == "json_invalid":
        return RequestError(f"The body is not valid JSON: {message}.", None, "invalid_json")
    param = field_name(first)
    if first["type"] == "missing":
        return RequestError(
            f"Missing required parameter: '{param}'.", param, "missing_required_parameter"
        )
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    code = "invalid_type" if first["type"].endswith("_type") else "invalid_value"
    return RequestError(f"Invalid '{param or 'body'}': {message}{more}.", param, code)


def field_name(detail: ErrorDetails) -> str | None:
    """``("messages", 0, "role")`` → ``messages[0].role``."""
    name = ""
    for part in detail["loc"]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.removeprefix(".")[:100] or None
