"""Responses in streams: which events, in which order, and that they are the response."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import check_answered, events, of_type, refusal
from ruvon.doctor.check import collect
from ruvon.doctor.expect import expect, expect_equal, expect_shape
from ruvon.doctor.groups.responses import post, respond, text_of
from ruvon.doctor.groups.responses_tools import REQUIRED
from ruvon.doctor.probe import Probe, Reply

ENDS = ("response.completed", "response.incomplete", "response.failed")
CALLING: dict[str, Any] = {"stream": True, **REQUIRED}


async def _reply(probe: Probe, fields: Any = None) -> Reply:
    fields = fields or {"stream": True}
    reply = await post(probe, **fields)
    check_answered(reply, fields)
    return reply


async def _events(probe: Probe, fields: Any = None) -> list[Any]:
    return events(await _reply(probe, fields))


async def _of(probe: Probe, kind: str, fields: Any = None) -> list[Any]:
    return of_type(await _events(probe, fields), kind)


async def content_type(probe: Probe) -> None:
    """A stream is text/event-stream."""
    kind = (await _reply(probe)).headers.get("Content-Type", "none")
    expect(kind.startswith("text/event-stream"), "text/event-stream", kind)


async def event_names(probe: Probe) -> None:
    """Every event has a name, which is its type."""
    reply = await _reply(probe)
    names = [frame.event for frame in reply.frames if frame.data not in (None, "[DONE]")]
    expect_equal(names, [event["type"] for event in events(reply)], "event names")


async def no_done(probe: Probe) -> None:
    """There is no [DONE]."""
    texts = [frame.data for frame in (await _reply(probe)).frames]
    expect("[DONE]" not in texts, "no [DONE]", texts[-1])


async def sequence_numbers(probe: Probe) -> None:
    """sequence_number counts from 0 by 1."""
    found = [event["sequence_number"] for event in await _events(probe)]
    expect_equal(found, list(range(len(found))), "sequence numbers")


async def created_first(probe: Probe) -> None:
    """The first event is response.created, with a response in progress and no output."""
    first = (await _events(probe))[0]
    response = {"status": ("in_progress", "queued"), "output": list, "usage?": None}
    expect_shape(first, {"type": "response.created", "response": response}, "the first event")
    expect_equal(first["response"]["output"], [], "its output")


async def in_progress_second(probe: Probe) -> None:
    """The second is response.in_progress."""
    expect_equal((await _events(probe))[1]["type"], "response.in_progress", "the second event")


async def one_end(probe: Probe) -> None:
    """The last is response.completed, incomplete or failed, and no other is."""
    kinds = [event["type"] for event in await _events(probe)]
    ends = [kind for kind in kinds if kind in ENDS]
    expect(len(ends) == 1 and kinds[-1] in ENDS, "one end, last", kinds[-3:])


async def incomplete(probe: Probe) -> None:
    """A response that max_output_tokens cuts off ends with response.incomplete."""
    last = (await _events(probe))[-1]
    expect_equal(last["type"], "response.incomplete", "the last event")
    expect_shape(last["response"], {"incomplete_details": {"reason": "max_output_tokens"}})


async def id_stable(probe: Probe) -> None:
    """All responses within events have one id."""
    ids = {event["response"]["id"] for event in await _events(probe) if "response" in event}
    expect_equal(len(ids), 1, "different ids")


async def order(probe: Probe) -> None:
    """A message is added, its part added, written, done; then part and item are done."""
    kinds = [event["type"] for event in await _events(probe)][2:-1]
    once = [kind for k, kind in enumerate(kinds) if k == 0 or kinds[k - 1] != kind]
    start = next((k for k, kind in enumerate(once) if kind.startswith("response.output_text")), 0)
    wanted = ["response.output_item.added", "response.content_part.added",
              "response.output_text.delta", "response.output_text.done",
              "response.content_part.done", "response.output_item.done"]  # fmt: skip
    expect_equal(once[start - 2 : start + 4], wanted, "events")


async def item_added(probe: Probe) -> None:
    """A message is added in progress and without content."""
    added = (await _of(probe, "response.output_item.added"))[0]["item"]
    expect_shape(added, {"id": str, "type": str, "status": "in_progress"}, "the item")


async def part_added(probe: Probe) -> None:
    """A part is added without text."""
    event = (await _of(probe, "response.content_part.added"))[-1]
    part = {"type": "output_text", "text": "", "annotations": list}
    expect_shape(event, {"item_id": str, "output_index": int, "content_index": 0, "part": part})


async def delta(probe: Probe) -> None:
    """A delta has item_id, output_index, content_index and delta."""
    shape = {"item_id": str, "output_index": int, "content_index": int, "delta": str}
    expect_shape(await _of(probe, "response.output_text.delta"), [shape], "deltas")


async def deltas_in_pieces(probe: Probe) -> None:
    """Text comes in several deltas."""
    found = await _of(probe, "response.output_text.delta")
    expect(len(found) > 2, "several deltas", len(found))


async def deltas_are_the_text(probe: Probe) -> None:
    """All deltas are the text of response.output_text.done."""
    text = "".join(event["delta"] for event in await _of(probe, "response.output_text.delta"))
    done = (await _of(probe, "response.output_text.done"))[0]
    expect_equal(done["text"], text, "the text")


async def part_done(probe: Probe) -> None:
    """response.content_part.done has that text."""
    done = (await _of(probe, "response.output_text.done"))[-1]
    part = (await _of(probe, "response.content_part.done"))[-1]["part"]
    expect_equal(part["text"], done["text"], "the text")


async def items_are_the_output(probe: Probe) -> None:
    """The items that are done are the output of the last response, ids and all."""
    done = [event["item"] for event in await _of(probe, "response.output_item.done")]
    last = (await _events(probe))[-1]["response"]
    expect_equal(done, last["output"], "items")


async def item_ids(probe: Probe) -> None:
    """An item has one id from added to done, and its deltas name it."""
    found = await _events(probe)
    ids: dict[int, set[str]] = {}
    for event in found:
        if "output_index" in event:
            name = event.get("item_id") or event["item"]["id"]
            ids.setdefault(event["output_index"], set()).add(name)
    expect_equal([len(each) for each in ids.values()], [1] * len(ids), "ids of each item")


async def output_index(probe: Probe) -> None:
    """output_index counts items from 0."""
    added = [event["output_index"] for event in await _of(probe, "response.output_item.added")]
    expect_equal(added, list(range(len(added))), "output_index")


async def usage(probe: Probe) -> None:
    """The last response tells usage, as the whole does."""
    whole = (await respond(probe))["usage"]
    last = (await _events(probe))[-1]["response"]["usage"]
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        expect_equal(last[name], whole[name], name)


async def text_as_whole(probe: Probe) -> None:
    """At temperature 0 the text is that of the whole response."""
    last = (await _events(probe))[-1]["response"]
    expect_equal(text_of(last), text_of(await respond(probe)), "the text")


async def fields_as_whole(probe: Probe) -> None:
    """The last response has the fields of the whole response."""
    last = (await _events(probe))[-1]["response"]
    expect_equal(sorted(last), sorted(await respond(probe)), "fields")


async def call_added(probe: Probe) -> None:
    """A call is added with its name and without arguments."""
    added = [event["item"] for event in await _of(probe, "response.output_item.added", CALLING)]
    calls = [item for item in added if item["type"] == "function_call"]
    expect(calls, "a function_call", added)
    shape = {"id": str, "call_id": str, "name": str, "arguments": "", "status": "in_progress"}
    expect_shape(calls[0], shape, "the item")


async def call_deltas(probe: Probe) -> None:
    """Arguments come in deltas, which are those of …arguments.done."""
    deltas = await _of(probe, "response.function_call_arguments.delta", CALLING)
    first = deltas[0]["item_id"]
    text = "".join(event["delta"] for event in deltas if event["item_id"] == first)
    done = (await _of(probe, "response.function_call_arguments.done", CALLING))[0]
    expect_equal(done["arguments"], text, "arguments")


async def call_done(probe: Probe) -> None:
    """The call that is done has these arguments, and the ids of the one that was added."""
    added = [event["item"] for event in await _of(probe, "response.output_item.added", CALLING)]
    done = [event["item"] for event in await _of(probe, "response.output_item.done", CALLING)]
    pairs = [[(item["id"], item.get("call_id")) for item in items] for items in (added, done)]
    expect_equal(pairs[1], pairs[0], "ids")


async def call_in_final(probe: Probe) -> None:
    """The last response holds it with the same ids."""
    done = [event["item"] for event in await _of(probe, "response.output_item.done", CALLING)]
    last = (await _events(probe, CALLING))[-1]["response"]
    expect_equal(last["output"], done, "output")


async def error_before(probe: Probe) -> None:
    """A bad request gets a 400 and JSON, not a stream."""
    await respond(probe)
    refusal(await post(probe, stream=True, temperature="hot"), names="temperature")


CHECKS = collect("responses.stream", globals())
