"""Who may ask, and who is asking: the server's keys.

A *tenant* is who has a key. What a request leaves behind (cached prefixes, responses, streams that
can be gone on with) is its tenant's and nobody else's.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from secrets import token_bytes

from aiohttp import web

from ruvon.errors import AuthenticationError

OPEN = frozenset({"/live", "/ready"})
"""Paths for supervisors and load balancers, which have no key; they tell nothing of the model."""

TENANT = web.RequestKey("tenant", str)
"""Who asks: an opaque id, the same for all requests with one key. "" where there are no keys."""


class Keys:
    """The keys that open the server, as digests under a secret of this process: how long it takes
    to look one up tells nothing of how much of it was right."""

    def __init__(self, keys: Iterable[str]) -> None:
        """Without ``keys`` everybody may ask."""
        self._secret = token_bytes(32)
        self._tenants = {digest: f"key-{digest.hex()[:12]}" for digest in map(self._digest, keys)}

    def check(self, http: web.Request) -> str:
        """The request's tenant. Raises `AuthenticationError` unless it has a key, where there are
        any."""
        if (tenant := self.find(http)) is not None:
            return tenant
        told = "wrong" if any(given_keys(http)) else "missing"
        raise AuthenticationError(
            f"The API key is {told}. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
        )

    def find(self, http: web.BaseRequest) -> str | None:
        """The request's tenant, None for one that has no key and needs it."""
        found = (self._tenants.get(self._digest(key)) for key in given_keys(http))
        tenant = next((each for each in found if each is not None), None)
        return "" if tenant is None and self._is_open(http.path) else tenant

    def _is_open(self, path: str) -> bool:
        return not self._tenants or path in OPEN

    def _digest(self, key: str) -> bytes:
        return blake2b(key.encode(errors="surrogateescape"), key=self._secret).digest()


KEYS = web.AppKey("keys", Keys)


def given_keys(http: web.BaseRequest) -> tuple[str, str]:
    """What the request says its key is: OpenAI's clients use the first header, Anthropic's either,
    or both."""
    scheme, _, token = http.headers.get("Authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return bearer, http.headers.get("x-api-key", "")
