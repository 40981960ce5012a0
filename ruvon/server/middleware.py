"""Around every request: its id, its log line, its time, and errors as OpenAI's JSON."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias
from uuid import uuid4

import orjson
import structlog
from aiohttp import web

from ruvon.errors import (
    AuthenticationError,
    DeadlineError,
    QueueFullError,
    RateLimitError,
    RequestError,
    UnavailableError,
)
from ruvon.server import cors, deadlines, rate_limits
from ruvon.server.events import CLIENT_LEFT, EventResponse
from ruvon.server.failures import error_answer, failure, openai_error, speaks_anthropic
from ruvon.server.keys import KEYS, TENANT
from ruvon.server.resume import is_resumed, resume
from ruvon.server.state import STATE, State
from ruvon.server.tracing import trace
from ruvon.server.work import WORK, times

log = structlog.get_logger(__name__)

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

FACTS = web.RequestKey("facts", dict[str, Any])
"""What a request's log line says of it, added to by its handler."""

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
QUIET = frozenset({"/health", "/live", "/ready", "/load", "/metrics", "/ui/{name}"})  # all the time


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request an id, run its handler, turn errors into JSON, and say what happened."""
    request_id = take_request_id(request)
    request[FACTS] = {"request_id": request_id}
    started_at = time.monotonic()
    status = CLIENT_LEFT
    response: web.StreamResponse | None = None
    with structlog.contextvars.bound_contextvars(request_id=request_id):
        try:
            response = await _respond(request, handler)
            status = response.outcome if isinstance(response, EventResponse) else response.status
            return response
        finally:
            _report(request, response, status, started_at)


def take_request_id(http: web.Request) -> str:
    """The client's own id of a request, or a new one where it has none that fits a log."""
    given = http.headers.get("X-Request-Id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid4().hex


async def add_request_id(http: web.Request, response: web.StreamResponse) -> None:
    """Signal before a response's headers go out."""
    response.headers["Server"] = "ruvon"
    cors.add_headers(http, response, http.app[STATE].server.cors_allow_origin)
    if rate_limits.is_limited(http):
        response.headers.update(http.app[rate_limits.LIMITS].headers(http[TENANT]))
    if FACTS in http:
        response.headers["X-Request-Id"] = http[FACTS]["request_id"]
        if speaks_anthropic(http):
            response.headers["Request-Id"] = http[FACTS]["request_id"]


async def _respond(http: web.Request, handler: Handler) -> web.StreamResponse:
    server = http.app[STATE].server
    try:
        if server.cors_allow_origin and cors.is_preflight(http):
            return cors.preflight(http, server.cors_allow_origin)
        http[TENANT] = http.app[KEYS].check(http)
        if http[TENANT]:
            http[FACTS]["tenant"] = http[TENANT]
        deadlines.begin(http)
        rate_limits.enter(http)
        if is_resumed(http):
            return await resume(http, server.sse_keep_alive_interval)
        return await handler(http)
    except Exception as error:
        error = as_ours(error, http)
        http[FACTS]["error"] = failure(error).code
        if isinstance(error, QueueFullError | RateLimitError):
            _count_rejection(http.app[STATE], error.setting)
        if not isinstance(error, RequestError | UnavailableError):
            log.error("request_failed", exc_info=error)
        return error_response(error, error_answer(error, http, http[FACTS]["request_id"]))


def as_ours(error: Exception, http: web.Request) -> Exception:
    """aiohttp's errors as ours; others as they are."""
    if isinstance(error, web.HTTPNotFound | web.HTTPMethodNotAllowed):
        return UrlError(error, f"{http.method} {http.path[:100]}")
    if isinstance(error, web.RequestPayloadError):
        return RequestError("The request body could not be read.", None, "invalid_body")
    return error


class UrlError(RequestError):
    """No such path, or not with this method."""

    def __init__(self, error: web.HTTPNotFound | web.HTTPMethodNotAllowed, what: str) -> None:
        super().__init__(f"Invalid URL ({what}).", None, "unknown_url")
        self.status = error.status
        self.headers: dict[str, str] = {}
        if isinstance(error, web.HTTPMethodNotAllowed):
            self.message = f"Method not allowed ({what})."
            self.code = "method_not_allowed"
            self.headers = {"Allow": ", ".join(sorted(error.allowed_methods))}


def error_response(error: Exception, answer: Mapping[str, object] | None = None) -> web.Response:
    """The one place where an error becomes a status, headers and JSON: ``answer``, or OpenAI's."""
    headers: dict[str, str] = {}
    status = failure(error).status
    if isinstance(error, UrlError):
        headers = error.headers
    if isinstance(error, AuthenticationError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, UnavailableError) and error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
        headers["Retry-After-Ms"] = str(math.ceil(1000 * error.retry_after))
    if status == 500 or isinstance(error, DeadlineError):
        headers["X-Should-Retry"] = "false"  # the OpenAI SDK would try twice more
    return json_response(answer or openai_error(error), status, headers)


def json_response(
    data: object, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """``data`` as a JSON response."""
    return web.Response(
        body=orjson.dumps(data), status=status, content_type="application/json", headers=headers
    )


def _count_rejection(state: State, setting: str) -> None:
    if state.service is not None:
        state.service.metrics.record_rejection(setting)


def _report(
    http: web.Request, response: web.StreamResponse | None, status: int, began_at: float
) -> None:
    """Metrics, the request's trace, and its log line."""
    state, seconds = http.app[STATE], time.monotonic() - began_at
    resource = http.match_info.route.resource
    route = "unknown" if resource is None else resource.canonical
    state.http.record(route, http.method, str(status), seconds)
    facts = http[FACTS] | times(http[WORK].finished if WORK in http else None)
    if isinstance(response, EventResponse) and response.error is not None:
        facts["error"] = response.error
    if trace_id := trace(http, route, facts, status, began_at, seconds):
        facts["trace_id"] = trace_id
    if not state.server.log_requests:
        return
    del facts["request_id"]  # the line has it
    write = log.debug if route in QUIET else log.info
    write(
        "request",
        method=http.method,
        path=http.path[:200],
        status=status,
        ms=round(1000 * seconds, 1),
        bytes=0 if response is None else response.body_length or response.content_length or 0,
        client=_client(http),
        user_agent=http.headers.get("User-Agent", "")[:100],
        **facts,
    )


def _client(http: web.Request) -> str | None:
    """The address at the other end. Who reaches a Unix socket is a router, which says whose."""
    return http.remote or http.headers.get("X-Forwarded-For", "")[:100] or None
