"""Who may ask: the server's keys."""

from __future__ import annotations

from collections.abc import Sequence
from hmac import compare_digest

from aiohttp import web

from ruvon.errors import AuthenticationError

OPEN = frozenset({"/live", "/ready"})
"""Paths for supervisors and load balancers, which have no key; they tell nothing of the model."""


def check(http: web.Request, keys: Sequence[str]) -> None:
    """Raise `AuthenticationError` unless the request has one of ``keys``, where there are any."""
    if not allowed(http, keys):
        told = "wrong" if any(given_keys(http)) else "missing"
        raise AuthenticationError(
            f"The API key is {told}. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
        )


def allowed(http: web.Request, keys: Sequence[str]) -> bool:
    """Whether the request may go on. Compares with every key, byte for byte, so that the time it
    takes does not tell how much of a key was right."""
    if not keys or http.path in OPEN:
        return True
    given = [key.encode(errors="surrogateescape") for key in given_keys(http)]
    return any([compare_digest(one, key.encode()) for one in given for key in keys])  # noqa: C419


def given_keys(http: web.Request) -> tuple[str, str]:
    """What the request says its key is: OpenAI's clients use the first header, Anthropic's either,
    or both."""
    scheme, _, token = http.headers.get("Authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return bearer, http.headers.get("x-api-key", "")
