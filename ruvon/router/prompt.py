"""What of a request decides where it goes: its prompt, whose it is, and what it goes on with.

Nothing is checked here. A body that makes no sense, or holds more values than a prompt may have,
has no prompt, and a replica says what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from ruvon.errors import RequestError
from ruvon.router.prefixes import PIECE, chain
from ruvon.server.shape import Bounds, check_shape

PARTS: Mapping[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("tools", "messages"),
    "/v1/completions": ("prompt",),
    "/v1/responses": ("tools", "instructions", "input"),
    "/v1/responses/compact": ("tools", "instructions", "input"),
    "/v1/messages": ("tools", "system", "messages"),
    "/v1/decisions": ("messages", "prompt"),
    "/api/chat": ("tools", "messages"),
    "/api/generate": ("system", "prompt"),
}
"""The fields that make a prompt, in the order in which templates write them."""

BOUNDS = Bounds.of_context(131_072)
"""What a body is counted for before it is parsed, which holds up everything else meanwhile."""

STORED = re.compile(r"/v1/responses/((?:resp|cmp)_[^/]+)(?:/.*)?")
EXPLAINED = re.compile(r"/v1/requests/(.+)/explain")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as a router sees it. ``held`` is the id of something that only one replica has."""

    keys: tuple[bytes, ...] = ()
    size: int = 0  # bytes
    held: str | None = None

    def share(self, num_keys: int) -> float:
        """How much of the prompt that many keys stand for, 0 to 1."""
        return num_keys * PIECE / self.size if self.size else 0.0


def read_prompt(path: str, headers: Mapping[str, str], body: bytes) -> Prompt:
    """What a request says; a few microseconds for a kilobyte."""
    held = _held(path, headers)
    if path not in PARTS or not body:
        return Prompt(held=held)
    try:
        check_shape(body, BOUNDS)
        data = orjson.loads(body)
    except (RequestError, orjson.JSONDecodeError):
        return Prompt(held=held)
    if not isinstance(data, dict):
        return Prompt(held=held)
    text = b"".join(_pieces(data, PARTS[path]))
    asked_with = headers.get("Authorization"), headers.get("x-api-key")
    salt = path, data.get("model"), data.get("cache_salt"), *asked_with
    root = repr(salt).encode(errors="replace")
    return Prompt(tuple(chain(root, text)), len(text), held or _referred(data))


def _held(path: str, headers: Mapping[str, str]) -> str | None:
    """The stored response or the past request in a path, or the stream that is gone on with."""
    if (named := STORED.fullmatch(path) or EXPLAINED.fullmatch(path)) is not None:
        return named[1]
    stream, _, number = headers.get("Last-Event-ID", "").rpartition(":")
    return stream if number else None


def _referred(data: Mapping[str, Any]) -> str | None:
    """The response or the item that the body refers to."""
    if isinstance(previous := data.get("previous_response_id"), str):
        return previous
    items = data.get("input")
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and item.get("type") == "item_reference":
            return str(item.get("id"))
    return None


def _pieces(data: Mapping[str, Any], names: Iterable[str]) -> Iterable[bytes]:
    """The fields as bytes, so that a longer conversation begins with the bytes of a shorter one."""
    for name in names:
        value = data.get(name)
        if isinstance(value, str):
            yield value.encode(errors="replace")
        elif isinstance(value, list):
            yield orjson.dumps(value)[:-1]
        elif value is not None:
            yield orjson.dumps(value)
