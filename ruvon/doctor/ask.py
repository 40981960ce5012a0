"""Requests as checks make them, and what counts as answered, as refused, and as not offered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import orjson

from ruvon.doctor.expect import Failed, Skipped, brief, expect, expect_shape
from ruvon.doctor.probe import Probe, Reply

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
STORY = "Tell me a long story about the sea."
NOT_OFFERED = {404, 405, 501}

ERROR = {"message": str, "type": str, "param?": (str, None), "code?": (str, int, None)}


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


async def post_chat(probe: Probe, again: int = 0, **fields: Any) -> Reply:
    """A short greedy chat; ``fields`` add to the request or replace what is there."""
    body = {"model": probe.model, "messages": user(STORY), "max_tokens": 8, "temperature": 0}
    return await probe.post(CHAT, body | fields, again=again)


async def post_completion(probe: Probe, again: int = 0, **fields: Any) -> Reply:
    """A short greedy completion."""
    body = {"model": probe.model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    return await probe.post(COMPLETIONS, body | fields, again=again)


async def chat(probe: Probe, again: int = 0, **fields: Any) -> Any:
    """A chat's answer."""
    return answer(await post_chat(probe, again, **fields), fields)


async def chat_chunks(probe: Probe, again: int = 0, **fields: Any) -> list[Any]:
    """The chunks of a streamed chat, without ``[DONE]``."""
    reply = await post_chat(probe, again, **{"stream": True, **fields})
    return events(reply, fields)


async def complete(probe: Probe, again: int = 0, **fields: Any) -> Any:
    """A completion's answer."""
    return answer(await post_completion(probe, again, **fields), fields)


async def completion_chunks(probe: Probe, again: int = 0, **fields: Any) -> list[Any]:
    """The chunks of a streamed completion, without ``[DONE]``."""
    reply = await post_completion(probe, again, **{"stream": True, **fields})
    return events(reply, fields)


def answer(reply: Reply, fields: Iterable[str] = ()) -> Any:
    """The JSON of a 200. Raises Skipped where there is no such endpoint, or where one of
    ``fields`` is refused by name; Failed for every other status."""
    check_answered(reply, fields)
    return reply.json


def events(reply: Reply, fields: Iterable[str] = ()) -> list[Any]:
    """The JSON of a stream's events, without ``[DONE]``; an error among them fails."""
    check_answered(reply, fields)
    texts = [frame.data for frame in reply.frames if frame.data not in (None, "[DONE]")]
    found = [parse(text) for text in texts if text is not None]
    expect(found, "a stream of events", reply.body.decode(errors="replace"))
    for event in found:
        if isinstance(event, dict) and event.get("error"):
            raise Failed(f"an error in the stream: {brief(event)}")
    return found


def of_type(found: Sequence[Any], kind: str) -> list[Any]:
    """The events of one type; there must be some."""
    mine = [event for event in found if event["type"] == kind]
    expect(mine, f"events {kind}", sorted({event["type"] for event in found}))
    return mine


def parse(text: str) -> Any:
    """JSON, or Failed. Numbers may be larger than any float: a model writes what it likes."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except ValueError:
        raise Failed(f"expected JSON; got {brief(text)}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def check_answered(reply: Reply, fields: Iterable[str] = ()) -> None:
    """As `answer`, for any body."""
    if reply.status == 200:
        return
    if not_offered(reply):
        raise Skipped(f"{reply.request} is not offered ({reply.status})")
    message = message_of(reply)
    if reply.status in (400, 422, 501) and (name := refused_name(reply, fields)):
        raise Skipped(f"{name} is refused by name: {brief(message, 120)}")
    raise Failed(f"{reply.request}: expected 200; got {reply.status}: {brief(message)}")


def not_offered(reply: Reply) -> bool:
    """Whether there is no such endpoint. A model or an object that is not there is another 404."""
    told = f"{error_of(reply).get('code')} {message_of(reply)}"
    missing = r"(model|response)_not_found|\bmodel\b.*\b(not|exist)|\bresp_|response with"
    return reply.status in NOT_OFFERED and not re.search(missing, told, re.IGNORECASE)


def refused_name(reply: Reply, fields: Iterable[str]) -> str | None:
    """Which of ``fields`` the server says it does not support."""
    error, message = error_of(reply), message_of(reply)
    says_so = r"unsupported|not (yet )?(be )?(supported|served|implemented)|does not support"
    if not re.search(says_so, f"{error.get('code')} {message}", re.IGNORECASE):
        return None
    told = f"{error.get('param')} {message}"
    return next((name for name in fields if re.search(rf"\b{re.escape(name)}\b", told)), None)


def error_of(reply: Reply) -> dict[str, Any]:
    """The error object, whatever its place; empty if there is none."""
    try:
        found = orjson.loads(reply.body)
    except orjson.JSONDecodeError:
        return {}
    inner = found.get("error", found) if isinstance(found, dict) else {}
    return inner if isinstance(inner, dict) else {}


def message_of(reply: Reply) -> str:
    """What an error says."""
    return str(error_of(reply).get("message") or reply.body.decode(errors="replace"))


def refusal(
    reply: Reply, *statuses: int, names: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The error object of a request that should be refused, with one of ``statuses`` (400).
    ``names`` is the field that it should name, ``code`` the code it should have."""
    wanted = statuses or (400,)
    if not_offered(reply) and reply.status not in wanted:
        raise Skipped(f"{reply.request} is not offered ({reply.status})")
    if reply.status not in wanted:
        listed = " or ".join(map(str, wanted))
        came = f"{reply.status}: {brief(reply.body.decode(errors='replace'))}"
        raise Failed(f"{reply.request}: expected {listed}; got {came}")
    expect_shape(reply.json, {"error": ERROR})
    error: dict[str, Any] = reply.json["error"]
    if names is not None:
        told = f"{error.get('param')} {error['message']}"
        expect(names_field(told, names), f"an error that names {names}", error)
    if code is not None:
        expect(error.get("code") == code, f"code {code}", error)
    return error


def names_field(told: str, name: str) -> bool:
    """Whether an error names a field: its path, or the last part of it."""
    return name in told or bool(re.search(rf"\b{re.escape(re.split('[.]', name)[-1])}\b", told))
