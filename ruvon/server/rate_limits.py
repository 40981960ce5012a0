"""What a key may ask for in a minute: token buckets, and the headers that tell of them.

A bucket of requests and one of tokens for each tenant. Nobody knows how long an answer gets before
it is there: so a request is let in as long as tokens are left, what it takes is counted as it
comes, and a tenant that has taken more than there was waits until its bucket is above zero again.

Where several replicas answer, the router in front of them has the buckets. How many tokens were
taken only they know: each keeps a `Ledger`, and the router reads it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from hashlib import blake2b

from aiohttp import web

from ruvon.errors import RateLimitError
from ruvon.server.keys import TENANT

MINUTE = 60.0

PATHS = frozenset(
    {
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/decisions",
        "/v1/messages", "/v1/responses", "/v1/responses/compact", "/api/chat", "/api/generate",
    }
)  # fmt: skip
"""What is limited: whatever the model computes for."""


class Bucket:
    """Holds ``most``, and fills up in a minute."""

    def __init__(self, most: int, now: float) -> None:
        self.most = most
        self._level = float(most)
        self._at = now

    def level(self, now: float) -> float:
        """What is in it; below zero, what is owed."""
        self._level = min(self._level + (now - self._at) * self.most / MINUTE, self.most)
        self._at = now
        return self._level

    def take(self, amount: int, now: float) -> None:
        """Take some out, whether it is there or not."""
        self._level = self.level(now) - amount

    def seconds_until(self, amount: float, now: float) -> float:
        """When so much will be in it."""
        return max(amount - self.level(now), 0.0) * MINUTE / self.most


def account_of(tenant: str, secret: bytes) -> str:
    """What a tenant is called where others may see it: those who know the secret can tell."""
    return blake2b(tenant.encode(), key=secret, digest_size=8).hexdigest()


class Ledger:
    """The tokens that tenants have taken since this process began, by account."""

    def __init__(self, secret: bytes) -> None:
        self.totals: dict[str, int] = {}
        self._secret = secret

    def spend(self, tenant: str, num_tokens: int) -> None:
        account = account_of(tenant, self._secret)
        self.totals[account] = self.totals.get(account, 0) + num_tokens


class RateLimits:
    """The buckets of all tenants. A limit of None is none; ``ledger`` is what a router reads that
    has limits for all its replicas."""

    def __init__(
        self,
        requests: int | None,
        tokens: int | None,
        clock: Callable[[], float] = time.monotonic,
        ledger: Ledger | None = None,
    ) -> None:
        self.ledger = ledger
        limits = {"requests": requests, "tokens": tokens}
        self._limits = {kind: most for kind, most in limits.items() if most is not None}
        self._buckets: dict[str, dict[str, Bucket]] = {}  # by tenant, by kind
        self._clock = clock

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return bool(self._limits)

    @property
    def tenants(self) -> Iterable[str]:
        """Who has asked."""
        return self._buckets

    def _of(self, tenant: str) -> dict[str, Bucket]:
        if tenant not in self._buckets:
            now = self._clock()
            self._buckets[tenant] = {kind: Bucket(most, now) for kind, most in self._limits.items()}
        return self._buckets[tenant]

    def enter(self, tenant: str) -> None:
        """One more request. Raises `RateLimitError` if a bucket is empty; takes nothing then."""
        buckets = self._of(tenant)
        now = self._clock()
        for kind, bucket in buckets.items():
            if wait := bucket.seconds_until(1.0, now):
                raise RateLimitError(
                    f"Rate limit reached: {bucket.most} {kind} per minute. Please try again in "
                    f"{wait:.3g}s.",
                    f"rate_limit_{kind}",
                    wait,
                )
        if "requests" in buckets:
            buckets["requests"].take(1, now)

    def spend(self, tenant: str, num_tokens: int) -> None:
        """Tokens were read or written."""
        if self.ledger is not None:
            self.ledger.spend(tenant, num_tokens)
        if "tokens" in self._limits:
            self._of(tenant)["tokens"].take(num_tokens, self._clock())

    def headers(self, tenant: str) -> dict[str, str]:
        """OpenAI's: the limits, what is left, and when that is all there again."""
        buckets, told = self._of(tenant), {}
        now = self._clock()
        for kind, bucket in buckets.items():
            told[f"X-RateLimit-Limit-{kind.title()}"] = str(bucket.most)
            left = max(math.floor(bucket.level(now)), 0)
            told[f"X-RateLimit-Remaining-{kind.title()}"] = str(left)
            told[f"X-RateLimit-Reset-{kind.title()}"] = span(bucket.seconds_until(bucket.most, now))
        return told


def span(seconds: float) -> str:
    """A time as OpenAI writes it: ``6m0s``, ``1.2s``, ``20ms``."""
    if seconds < 1:
        return f"{math.ceil(1000 * seconds)}ms"
    minutes, rest = divmod(math.ceil(1000 * seconds) / 1000, MINUTE)
    return f"{minutes:.0f}m{rest:g}s" if minutes else f"{rest:g}s"


LIMITS = web.AppKey("limits", RateLimits)


def enter(http: web.Request) -> None:
    """Count a request against its key. Raises `RateLimitError`."""
    if is_limited(http):
        http.app[LIMITS].enter(http[TENANT])


def is_limited(http: web.Request) -> bool:
    """Whether a request's answer tells of its key's limits."""
    return http.method == "POST" and http.path in PATHS and TENANT in http
