"""Which web pages may read answers: cross-origin resource sharing, as the Fetch standard has it.

Keys come in headers, never in cookies, so answers never allow credentials.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

EXPOSED = (
    "X-Request-Id, X-Ruvon-Ignored, Retry-After, Retry-After-Ms, X-Should-Retry, WWW-Authenticate, "
    "X-RateLimit-Limit-Requests, X-RateLimit-Remaining-Requests, X-RateLimit-Reset-Requests, "
    "X-RateLimit-Limit-Tokens, X-RateLimit-Remaining-Tokens, X-RateLimit-Reset-Tokens"
)
METHODS = "GET, POST, DELETE"
MAX_AGE = "600"  # seconds that a browser may remember a preflight
MOST_HEADERS = 4096  # characters of a list that is repeated


def is_preflight(http: web.Request) -> bool:
    """Whether a browser asks if it may ask; it never sends a key with that."""
    headers = http.headers
    return (
        http.method == "OPTIONS"
        and "Origin" in headers
        and "Access-Control-Request-Method" in headers
    )


def preflight(http: web.Request, origins: Sequence[str]) -> web.Response:
    """The answer to it. Whether the origin may is in the headers that `add_headers` adds."""
    headers = {"Access-Control-Allow-Methods": METHODS, "Access-Control-Max-Age": MAX_AGE}
    wanted = http.headers.get("Access-Control-Request-Headers", "")
    if wanted and len(wanted) <= MOST_HEADERS and wanted.isprintable() and wanted.isascii():
        headers["Access-Control-Allow-Headers"] = wanted
    if allowed_origin(http, origins) is None:
        headers = {}
    return web.Response(status=204, headers=headers)


def add_headers(
    http: web.BaseRequest, response: web.StreamResponse, origins: Sequence[str]
) -> None:
    """Let the page that asks read the response, errors included, if its origin is allowed."""
    if not origins:
        return
    if "*" not in origins:
        response.headers.add("Vary", "Origin")
    if (origin := allowed_origin(http, origins)) is not None:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = EXPOSED


def allowed_origin(http: web.BaseRequest, origins: Sequence[str]) -> str | None:
    """What to allow the request's origin as; None if it is not, or there is none."""
    origin = http.headers.get("Origin")
    if origin is None:
        return None
    if "*" in origins:
        return "*"
    return origin if origin in origins else None
