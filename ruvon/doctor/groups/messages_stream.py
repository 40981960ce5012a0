"""Messages in streams."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import check_answered, events, of_type, parse
from ruvon.doctor.check import Check, collect
from ruvon.doctor.expect import expect, expect_equal, expect_shape
from ruvon.doctor.groups.messages import ANY, STOPS, post, say, text_of
from ruvon.doctor.groups.tools import check_arguments
from ruvon.doctor.probe import Probe, Reply

CALLING: dict[str, Any] = {"stream": True, **ANY}


async def _reply(probe: Probe, fields: Any = None) -> Reply:
    fields = fields or {"stream": True}
    reply = await post(probe, **fields)
    check_answered(reply, fields)
    return reply


async def _events(probe: Probe, fields: Any = None) -> list[Any]:
    """All events but pings."""
    return [e for e in events(await _reply(probe, fields)) if e["type"] != "ping"]


async def _of(probe: Probe, kind: str, fields: Any = None) -> list[Any]:
    return of_type(await _events(probe, fields), kind)


async def event_names(probe: Probe) -> None:
    """Every event has a name, which is its type."""
    reply = await _reply(probe)
    names = [frame.event for frame in reply.frames if frame.data is not None]
    expect_equal(names, [event["type"] for event in events(reply)], "event names")


async def no_done(probe: Probe) -> None:
    """There is no [DONE]."""
    texts = [frame.data for frame in (await _reply(probe)).frames]
    expect("[DONE]" not in texts, "no [DONE]", texts[-1])


async def start(probe: Probe) -> None:
    """The first event is message_start, with an empty message and input_tokens."""
    first = (await _events(probe))[0]
    message = {
        "id": str,
        "type": "message",
        "role": "assistant",
        "content": list,
        "stop_reason": None,
        "usage": {"input_tokens": int, "output_tokens": int},
    }
    expect_shape(first, {"type": "message_start", "message": message}, "the first event")
    expect_equal(first["message"]["content"], [], "its content")


async def stop(probe: Probe) -> None:
    """The last two are message_delta and message_stop."""
    kinds = [event["type"] for event in await _events(probe)]
    expect_equal(kinds[-2:], ["message_delta", "message_stop"], "the last events")


async def stop_reason(probe: Probe) -> None:
    """message_delta tells stop_reason and output_tokens."""
    event = (await _of(probe, "message_delta"))[-1]
    delta = {"stop_reason": STOPS, "stop_sequence": None}
    expect_shape(event, {"delta": delta, "usage": {"output_tokens": int}}, "message_delta")


async def usage_as_whole(probe: Probe) -> None:
    """The counts are those of the whole message."""
    whole = (await say(probe))["usage"]["output_tokens"]
    found = (await _of(probe, "message_delta"))[-1]["usage"]["output_tokens"]
    expect_equal(found, whole, "output_tokens")


async def blocks(probe: Probe) -> None:
    """Each block is started, written and stopped before the next begins."""
    open_block, count = None, 0
    for event in await _events(probe, CALLING):
        kind = event["type"]
        if kind == "content_block_start":
            expect((open_block, event["index"]) == (None, count), f"block {count}", event)
            open_block, count = event["index"], count + 1
        elif kind.startswith("content_block_"):
            expect_equal(event["index"], open_block, f"the index of {kind}")
            open_block = None if kind == "content_block_stop" else open_block
    expect_equal(open_block, None, "the block left open")


async def block_start(probe: Probe) -> None:
    """A block of text starts empty."""
    block = (await _of(probe, "content_block_start"))[-1]["content_block"]
    expect_shape(block, {"type": "text", "text": ""}, "content_block")


async def text_delta(probe: Probe) -> None:
    """Text comes as text_delta, in several pieces."""
    found = await _of(probe, "content_block_delta")
    expect(len(found) > 2, "several deltas", found)
    expect_shape(found[-1], {"index": int, "delta": {"type": "text_delta", "text": str}})


async def text_as_whole(probe: Probe) -> None:
    """At temperature 0 the pieces are the whole text."""
    pieces = [event["delta"].get("text", "") for event in await _of(probe, "content_block_delta")]
    expect_equal("".join(pieces), text_of(await say(probe)), "the text")


async def tool_start(probe: Probe) -> None:
    """A call starts with id, name and an empty input."""
    blocks = [e["content_block"] for e in await _of(probe, "content_block_start", CALLING)]
    uses = [block for block in blocks if block["type"] == "tool_use"]
    expect(uses, "tool_use", blocks)
    expect_shape(uses[0], {"id": str, "name": str, "input": dict}, "content_block")
    expect_equal(uses[0]["input"], {}, "its input")


async def tool_input(probe: Probe) -> None:
    """Its input comes as input_json_delta, JSON when put together."""
    names, texts = {}, {}
    for event in await _events(probe, CALLING):
        if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
            names[event["index"]] = event["content_block"]["name"]
            texts[event["index"]] = ""
        elif event["type"] == "content_block_delta" and event["index"] in texts:
            expect_equal(event["delta"]["type"], "input_json_delta", "the delta's type")
            texts[event["index"]] += event["delta"]["partial_json"]
    expect(texts, "a call", names)
    for index, text in texts.items():
        parse(text)
        check_arguments(names[index], text)


async def tool_stop_reason(probe: Probe) -> None:
    """The stop_reason is tool_use then."""
    event = (await _of(probe, "message_delta", CALLING))[-1]
    expect_equal(event["delta"]["stop_reason"], "tool_use", "stop_reason")


async def error_before(probe: Probe) -> None:
    """A bad request gets a 400 and JSON, not a stream."""
    await say(probe)
    reply = await post(probe, stream=True, temperature="hot")
    expect_equal(reply.status, 400, "status")
    expect_shape(reply.json, {"type": "error", "error": {"message": str}})


CHECKS = [
    Check(check.id, check.title, check.ask, optional=True)
    for check in collect("messages.stream", globals())
]
