"""What an error says to a client, in the words of the API that it asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

from aiohttp import web

from ruvon.errors import ContextLengthError, RequestError, UnavailableError
from ruvon.server.responses import AnthropicErrorAnswer, ErrorAnswer, OllamaErrorAnswer


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


def openai_error(error: Exception, request_id: str | None = None) -> ErrorAnswer:
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


def anthropic_error(error: Exception, request_id: str | None = None) -> AnthropicErrorAnswer:
    """Anthropic's: its type follows from the status, and the message names the field. Of a prompt
    that does not fit it is, to the letter, what clients look for before they shorten it."""
    told = failure(error)
    message = sentence(told)
    if isinstance(error, ContextLengthError) and error.too_many:
        num_tokens, most = error.too_many
        message = f"prompt is too long: {num_tokens} tokens > {most} maximum"
    elif isinstance(error, ContextLengthError):
        message = f"prompt is too long: {told.message}"
    kind = ANTHROPIC_TYPES.get(told.status, "api_error")
    return {
        "type": "error",
        "error": {
            "type": kind,
            "message": message,
            "details": {"error_code": told.code},
        },
        "request_id": request_id,
    }


def ollama_error(error: Exception, request_id: str | None = None) -> OllamaErrorAnswer:
    """Ollama's is a sentence."""
    return {"error": sentence(failure(error))}


def sentence(told: Failure) -> str:
    """The message, which names the field."""
    start = f"{told.param}: " if told.param and told.param not in told.message else ""
    return start + told.message


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
    504: "timeout_error",
}

Shape: TypeAlias = Callable[[Exception, str | None], Mapping[str, object]]

SHAPES: Mapping[str, Shape] = {"/v1/messages": anthropic_error, "/api/": ollama_error}
"""The beginning of a path → how an API says errors; all others say them as OpenAI does."""


def speaks_anthropic(http: web.BaseRequest) -> bool:
    """Whether the client reads Anthropic's answers where an address has others too."""
    return "anthropic-version" in http.headers


def error_answer(error: Exception, http: web.BaseRequest, request_id: str) -> Mapping[str, object]:
    """The body of an error's response, as the API that was asked says it."""
    if speaks_anthropic(http):
        return anthropic_error(error, request_id)
    shapes = (shape for path, shape in SHAPES.items() if http.path.startswith(path))
    return next(shapes, openai_error)(error, request_id)
