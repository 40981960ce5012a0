"""How long a request may take, from its first byte on: what it says, what the server says."""

from __future__ import annotations

import math
import time

from aiohttp import web

from ruvon.errors import DeadlineError, RequestError
from ruvon.server.state import STATE

HEADER = "X-Request-Timeout"

ARRIVED = web.RequestKey("arrived", float)
"""When a request came, on the monotonic clock."""

UNTIL = web.RequestKey("until", float)
"""When its time is up; not there for one that has all the time."""


def begin(http: web.Request) -> None:
    """Take the time, and what the server and the request's headers say about its limit."""
    http[ARRIVED] = time.monotonic()
    limit_time(http, http.app[STATE].server.request_timeout)
    if text := http.headers.get(HEADER):
        limit_time(http, _seconds(text))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RequestError(f"{HEADER} must be a number of seconds above 0.", HEADER)
    return seconds


def limit_time(http: web.Request, seconds: float | None) -> None:
    """Give a request so many seconds from its arrival at most, if any are named."""
    if seconds is not None:
        http[UNTIL] = min(http[ARRIVED] + seconds, http.get(UNTIL, math.inf))


def remaining(http: web.Request) -> float | None:
    """The seconds that a request has left, None for all it needs. Raises `DeadlineError`."""
    if UNTIL not in http:
        return None
    left = http[UNTIL] - time.monotonic()
    if left <= 0:
        raise DeadlineError("The request's time was up before it could be queued.")
    return left
