"""Every error ruvon raises on purpose, and how each becomes an HTTP answer.

::

    RuvonError
    ├── ConfigError                 a flag, variable or TOML key is wrong; ends start-up
    ├── LoadError                   a checkpoint cannot be read; names file and tensor
    ├── PeerError                   a server that a client command talks to refused or failed
    ├── RequestError                the client's fault; carries OpenAI's type, param and code
    │   ├── ContextLengthError      400 context_length_exceeded
    │   ├── AuthenticationError     401 invalid_api_key, with WWW-Authenticate
    │   ├── AdminKeyError           403 admin_key_required
    │   ├── ModelNotFoundError      404 model_not_found
    │   ├── ResponseNotFoundError   404 response_not_found
    │   ├── StreamNotFoundError     404 stream_not_found
    │   ├── RequestNotFoundError    404 request_not_found
    │   ├── BodyTooLargeError       413 request_too_large
    │   ├── BodyTimeoutError        408 request_timeout
    │   ├── HeadTimeoutError        408 request_timeout
    │   └── EncodingError           415 unsupported_encoding
    └── UnavailableError            not the client's fault; may be tried again
        ├── QueueFullError          503, with Retry-After
        ├── RateLimitError          429, with Retry-After
        ├── DeadlineError           504, the request's own time is up
        ├── TooManyConnectionsError 503, with Retry-After
        ├── NotReadyError           503, still loading, or nobody can answer now
        │   └── ShuttingDownError   503, draining
        ├── GenerationError         500, this completion could not be computed
        └── EngineDeadError         500, the engine loop has failed
"""

from __future__ import annotations


class RuvonError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(RuvonError):
    """A setting is unknown, malformed or cannot be honoured; the message names it."""


class LoadError(RuvonError):
    """A checkpoint, tokenizer or config file cannot be used; the message names file and tensor."""


class PeerError(RuvonError):
    """A server that a client command talks to cannot be reached, refused or broke off."""


class RequestError(RuvonError):
    """The request is wrong. ``param`` names the field as OpenAI does (``messages[0].role``)."""

    status = 400
    type = "invalid_request_error"
    code: str | None = "invalid_value"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class ContextLengthError(RequestError):
    """Prompt and requested completion do not fit the model's context. ``too_many`` are the prompt's
    tokens, and the most that it may have, where it alone does not fit."""

    code = "context_length_exceeded"
    too_many: tuple[int, int] | None = None


class AuthenticationError(RequestError):
    """The request carries no key of the server's, or a wrong one."""

    status = 401
    code = "invalid_api_key"


class AdminKeyError(RequestError):
    """The request asks for what only an admin's key opens."""

    status = 403
    type = "permission_error"
    code = "admin_key_required"


class ModelNotFoundError(RequestError):
    """The request names a model that this server does not serve."""

    status = 404
    type = "not_found_error"
    code = "model_not_found"


class ResponseNotFoundError(RequestError):
    """No such response is stored: it never was, or is no longer."""

    status = 404
    type = "not_found_error"
    code = "response_not_found"


class StreamNotFoundError(RequestError):
    """The request wants to go on with a stream that is not kept."""

    status = 404
    type = "not_found_error"
    code = "stream_not_found"


class RequestNotFoundError(RequestError):
    """No such request is remembered: it never was, is no longer, or is another key's."""

    status = 404
    type = "not_found_error"
    code = "request_not_found"


class BodyTooLargeError(RequestError):
    """The request body is larger than the server accepts."""

    status = 413
    code = "request_too_large"


class BodyTimeoutError(RequestError):
    """The request body stopped coming."""

    status = 408
    code = "request_timeout"


class HeadTimeoutError(RequestError):
    """The request's headers did not come to an end."""

    status = 408
    code = "request_timeout"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"The request's headers were not there within {seconds:g} seconds.")


class EncodingError(RequestError):
    """The request body is compressed."""

    status = 415
    code = "unsupported_encoding"


class UnavailableError(RuvonError):
    """The server cannot take or finish this request now; ``retry_after`` is in seconds."""

    status = 503
    type = "server_error"
    code = "unavailable"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after


class QueueFullError(UnavailableError):
    """The waiting queue is at its bound. ``setting`` is the bound's, and ``excess`` what would have
    to leave first: sequences or tokens."""

    type = "overloaded"
    code = "queue_full"

    def __init__(self, message: str, setting: str, excess: int) -> None:
        super().__init__(message, 1.0)
        self.setting = setting
        self.excess = excess


class RateLimitError(UnavailableError):
    """A key has asked for more in a minute than it may; ``setting`` is the limit's."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, setting: str, retry_after: float) -> None:
        super().__init__(message, retry_after)
        self.setting = setting


class DeadlineError(UnavailableError):
    """The time that the request had is up."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class TooManyConnectionsError(UnavailableError):
    """As many connections are open as there may be, in all or from one address."""

    type = "overloaded"
    code = "too_many_connections"


class NotReadyError(UnavailableError):
    """The model is still loading, or no replica takes requests."""

    code = "not_ready"


class ShuttingDownError(NotReadyError):
    """The server is draining: this one will take no more."""

    code = "shutting_down"


class GenerationError(UnavailableError):
    """One sequence could not be computed, such as for a NaN among its logits; others go on."""

    status = 500
    code = "generation_failed"


class EngineDeadError(UnavailableError):
    """The engine loop has failed; every stream gets this error and readiness turns off."""

    status = 500
    code = "engine_dead"
