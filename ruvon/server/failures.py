"""What an error says to a client, in the words of the API that it asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ruvon.errors import RequestError, UnavailableError
from ruvon.server.responses import AnthropicErrorAnswer, ErrorAnswer


class Failure(NamedTuple):
    """What is told of an error. Our own mistakes stay in the log."""

    status: int
    type: str
    message: str
    param: str | None
    code: str | None


def failure(error: Exception) -> Failure:
    """An error's status, 500 for our own mistakes, and what OpenAI says of it."""
    if isinstance(error, RequestError):
        return Failure(error.status, error.type, error.message, error.param, error.code)
    if isinstance(error, UnavailableError):
        return Failure(error.status, error.type, error.message, None, error.code)
    return Failure(500, "server_error", "Internal error.", None, "internal_error")


def openai_error(error: Exception) -> ErrorAnswer:
    """OpenAI's nested object."""
    told = failure(error)
    return {
        "error": {
            "message": told.message,
            "type": told.type,
            "param": told.param,
            "code": told.code,
        }
    }


def anthropic_error(error: Exception) -> AnthropicErrorAnswer:
    """Anthropic's: its type follows from the status, and the message names the field."""
    told = failure(error)
    field = f"{told.param}: " if told.param and told.param not in told.message else ""
    kind = ANTHROPIC_TYPES.get(told.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": field + told.message}}


ANTHROPIC_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}

SHAPES: Mapping[str, Callable[[Exception], Mapping[str, object]]] = {
    "/v1/messages": anthropic_error,
}
"""The beginning of a path → how an API says errors; all others say them as OpenAI does."""


def error_answer(error: Exception, path: str = "") -> Mapping[str, object]:
    """The body of an error's response."""
    for beginning, shape in SHAPES.items():
        if path.startswith(beginning):
            return shape(error)
    return openai_error(error)
