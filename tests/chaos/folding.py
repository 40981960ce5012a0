"""Answers of all APIs made comparable: a stream folded into one value, whatever is new each time
left out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import orjson

NEW = {
    "id", "created", "created_at", "completed_at", "system_fingerprint", "request_id", "item_id",
    "call_id", "tool_use_id", "total_duration", "load_duration", "prompt_eval_duration",
    "eval_duration", "sequence_number", "timings",
    "cached_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "input_tokens",
}  # fmt: skip
"""Fields that differ from one time to the next: names, dates, and what a prefix cache had."""

GROWS = {
    "content", "text", "delta", "arguments", "input", "partial_json", "thinking", "reasoning",
    "reasoning_content", "response", "refusal",
}  # fmt: skip
"""Fields whose texts come in pieces. How large the pieces are depends on the load."""


def fold(stream: bool, body: bytes) -> bytes:
    """A digest of what a body says. Raises ValueError for what is no JSON, or ends too early."""
    if stream:
        said: Any = {}
        for event in events(body):
            key = event.get("type", "")
            said[key] = merge(said.get(key, {}), bare(event))
    else:
        said = bare(orjson.loads(body))
    return hashlib.sha1(orjson.dumps(said, option=orjson.OPT_SORT_KEYS)).digest()


def events(body: bytes) -> Iterator[dict[str, Any]]:
    """Of a stream of any API: server-sent events, or lines of JSON as Ollama has them."""
    if not body.endswith(b"\n"):
        raise ValueError("a stream that ends amid a line")
    for line in body.splitlines():
        data = line.removeprefix(b"data: ")
        if data.startswith(b"{"):
            yield orjson.loads(data)


def is_complete(body: bytes) -> bool:
    """Whether a stream has the end that its API gives it."""
    last = body.rstrip().rpartition(b"\n")[2]
    if last == b"data: [DONE]":
        return True
    return b'"message_stop"' in last or b'"done":true' in last or b'"response.' in last


def bare(value: Any) -> Any:
    """Without what is new each time."""
    if isinstance(value, dict):
        return {key: bare(one) for key, one in value.items() if key not in NEW}
    return [bare(one) for one in value] if isinstance(value, list) else value


def merge(old: Any, new: Any, name: str = "") -> Any:
    """What is known once ``new``, a later event or a part of it, has come."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {key: merge(old.get(key), value, key) for key, value in new.items()}
    if isinstance(old, list) and isinstance(new, list):
        return merge_lists(old, new)
    if isinstance(old, str) and isinstance(new, str) and name in GROWS:
        return old + new
    return old if new is None else new


def merge_lists(old: list[Any], new: list[Any]) -> list[Any]:
    if not all(isinstance(one, dict) and "index" in one for one in (*old, *new)):
        return [*old, *new]
    found = {one["index"]: one for one in old}
    for one in new:
        found[one["index"]] = merge(found.get(one["index"], {}), one)
    return [found[index] for index in sorted(found)]
