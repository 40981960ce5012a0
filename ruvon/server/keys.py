"""Who may ask, and who is asking: the server's keys.

A *tenant* is who has a key, or several under one name. What a request leaves behind (cached
prefixes, responses, streams that can be gone on with) is its tenant's and nobody else's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from secrets import token_bytes

from aiohttp import web

from ruvon.config import ServerConfig
from ruvon.config.server import KEY, is_loopback
from ruvon.errors import AdminKeyError, AuthenticationError, ConfigError

OPEN = frozenset({"/live", "/ready"})
"""Paths for supervisors and load balancers, which have no key; they tell nothing of the model."""

DEBUG = "/debug/"
"""Begins the paths that show what others ask: without an admin key nobody gets there."""

PAGE, PAGE_FILES = "/", "/ui/"
"""The page, which is the same on every server and tells nothing of this one: it asks for a key."""

WATCHED = frozenset({"/debug/live", "/debug/gate", "/debug/attention"})
"""What the page shows of the engine. Where there are no keys at all, it needs none either, from
this machine (`is_own`)."""

ROUTER = "/router/"
"""Begins the paths that show and change what a router has behind it."""

METRICS = "/metrics"
"""Tells how much others ask: once there are admin keys, it needs one."""

WEIGHT = r"\d{1,6}(\.\d{1,6})?"

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

TENANT = web.RequestKey("tenant", str)
"""Who asks: an opaque id, the same for all requests with one key. "" for who needs no key."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key, and whose it is: without a name, it stands for itself."""

    text: str = field(repr=False)
    name: str = ""
    is_admin: bool = False
    weight: float = 1.0  # of its share of a busy server


def read_keys(server: ServerConfig) -> list[Key]:
    """All keys of a server as they are now, in its settings and in its files. Raises ConfigError
    for a file that cannot be read or holds none: it must not open the server to everybody."""
    keys = [Key(text) for text in server.api_key]
    keys += read_file(server.api_key_file, "api_key_file")
    admin = [Key(text) for text in server.admin_key]
    admin += read_file(server.admin_key_file, "admin_key_file")
    return keys + [replace(key, is_admin=True) for key in admin]


def read_file(path: str | None, setting: str) -> list[Key]:
    """The keys in a file: on each line one, or a name and one, or these and a weight. What follows
    # is a comment."""
    if path is None:
        return []
    try:
        keys = list(parse_lines(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {path}: {error}") from None
    if not keys:
        raise ConfigError(f"{setting}: {path} holds no key")
    return keys


def parse_lines(text: str) -> Iterator[Key]:
    """Raises ValueError with the number of a line, not with what it holds."""
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, key, weight = [*words, "1"][:3] if len(words) > 1 else ("", words[0], "1")
        named = not name or NAME.fullmatch(name)
        if len(words) > 3 or not named or not re.fullmatch(KEY[0], key):
            raise ValueError(f"line {number} is not a key, or a name and a key: {KEY[1]}")
        if not re.fullmatch(WEIGHT, weight) or not float(weight):
            raise ValueError(f"line {number} ends in a weight that is no number above 0")
        yield Key(key, name, weight=float(weight))


class Keys:
    """The keys that open the server, as digests under a secret of this process: how long it takes
    to look one up tells nothing of how much of it was right."""

    def __init__(
        self, keys: Iterable[Key], has_page: bool = False, secret: bytes | None = None
    ) -> None:
        """``has_page``: the server has the page, and listens where `is_own` can be told.
        ``secret``: another process's, whose tenants are to have the same ids."""
        self._secret = secret or token_bytes(32)
        self._has_page = has_page
        self.replace(keys)

    def replace(self, keys: Iterable[Key]) -> None:
        """From now on these count. Without one that is no admin's, everybody may ask."""
        self._keys = {self._digest(key.text): key for key in keys}
        self._weights = {tenant_of(digest, key): key.weight for digest, key in self._keys.items()}
        self.are_needed = any(not key.is_admin for key in self._keys.values())
        self._has_admin = any(key.is_admin for key in self._keys.values())

    def check(self, http: web.BaseRequest) -> str:
        """The request's tenant. Raises `AuthenticationError` where it has no key and needs one,
        `AdminKeyError` where it needs an admin's."""
        digest, key = self._find(http)
        for_admin = self._is_for_admin(http.path)
        if key is not None and (key.is_admin or not for_admin):
            return tenant_of(digest, key)
        if self._is_open(http) or not (for_admin or self.are_needed):
            return ""
        if key is not None or not (self._has_admin or self.are_needed):
            raise AdminKeyError("This path needs an admin key (--admin-key).")
        told = "wrong" if any(given_keys(http)) else "missing"
        raise AuthenticationError(
            f"The API key is {told}. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
        )

    def is_admin(self, http: web.BaseRequest) -> bool:
        """Whether a request has an admin's key."""
        key = self._find(http)[1]
        return key is not None and key.is_admin

    def weight(self, tenant: str) -> float:
        """How much more than others a tenant gets of a busy server. Of several keys under one name
        the last one counts."""
        return self._weights.get(tenant, 1.0)

    def _is_open(self, http: web.BaseRequest) -> bool:
        """Whether this needs no key."""
        path = http.path
        if path in OPEN or not self._has_page:
            return path in OPEN
        if path in WATCHED:
            return not self._keys and is_own(http)
        return path == PAGE or path.startswith(PAGE_FILES)

    def _is_for_admin(self, path: str) -> bool:
        return path.startswith((DEBUG, ROUTER)) or (path == METRICS and self._has_admin)

    def _find(self, http: web.BaseRequest) -> tuple[bytes, Key | None]:
        """The key that a request has, under its digest; an admin's first."""
        digests = [self._digest(key) for key in given_keys(http) if key]
        found = [(digest, self._keys[digest]) for digest in digests if digest in self._keys]
        return max(found, key=lambda pair: pair[1].is_admin, default=(b"", None))

    def _digest(self, key: str) -> bytes:
        return blake2b(key.encode(errors="surrogateescape"), key=self._secret).digest()


def tenant_of(digest: bytes, key: Key) -> str:
    """Whose requests with a key are."""
    return key.name or f"key-{digest.hex()[:12]}"


KEYS = web.AppKey("keys", Keys)


def is_own(http: web.BaseRequest) -> bool:
    """Whether somebody at this machine asks, by a name that only this machine has. That is neither
    a proxy for others, nor another site's web page, nor one whose name was made to point here."""
    headers = http.headers
    if "Forwarded" in headers or "X-Forwarded-For" in headers:
        return False
    if headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
        return False
    host = re.sub(r":\d+$", "", http.host).strip("[]")
    return is_loopback(http.remote or "") and is_loopback(host)


def given_keys(http: web.BaseRequest) -> tuple[str, str]:
    """What the request says its key is: OpenAI's clients use the first header, Anthropic's either,
    or both."""
    scheme, _, token = http.headers.get("Authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return bearer, http.headers.get("x-api-key", "")
