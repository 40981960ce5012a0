"""The Responses API as the openai package types it, and a client that puts events together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import orjson
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

EVENTS: dict[str, type[BaseModel]] = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in get_args(get_args(ResponseStreamEvent)[0])
}
"""An event's ``type`` → the package's class for it."""

BEYOND = {
    "presence_penalty", "frequency_penalty", "store",  # of a response: Open Responses has them
    "name",  # of a function_call_arguments.done
    "bytes",  # of log-probabilities in events, as in the items
    "error",  # of an error event: for it the package raises
    "status",  # of a custom tool call
}  # fmt: skip
"""What the package's classes do not declare."""


def extras(model: object) -> Iterator[str]:
    """Fields that no class declares."""
    if isinstance(model, BaseModel):
        yield from model.model_extra or ()
        for name in type(model).model_fields:
            yield from extras(getattr(model, name))
    elif isinstance(model, list):
        for item in model:
            yield from extras(item)


def check(kind: type[BaseModel], data: Any) -> None:
    """Hold JSON against a class, strictly; nothing may be there that it does not declare."""
    model = kind.model_validate_json(orjson.dumps(data), strict=True)
    assert set(extras(model)) <= BEYOND, model


def check_response(data: Any) -> None:
    check(Response, data)


def parse_events(body: bytes) -> list[dict[str, Any]]:
    """A stream's events: each well formed, of its class, and numbered."""
    events = []
    for frame in body.decode().removesuffix("\n\n").split("\n\n"):
        if frame.startswith(":"):
            continue
        name, data = frame.split("\n")
        event = orjson.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        check(EVENTS[event["type"]], event)
        events.append(event)
    return events


def check_stream(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Hold a whole stream against its rules; returns the final response."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    final = events[-1]["response"]
    check_response(final)
    if final["status"] != "failed":
        assert put_together(events) == final["output"]
    return final


def put_together(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output as a client has it that trusts the deltas; every ``done`` must agree."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif "output_index" in event:
            item = items[event["output_index"]]
            assert event.get("item_id", item["id"]) == item["id"]
            _apply(kind, event, item)
    return items


KEYS = {"function_call_arguments": "arguments", "custom_tool_call_input": "input"}


def _apply(kind: str, event: dict[str, Any], item: dict[str, Any]) -> None:
    what, _, step = kind.rpartition(".")
    if kind == "output_item.done":
        later = {"status", "encrypted_content"}
        assert {k: v for k, v in event["item"].items() if k not in later} == {
            k: v for k, v in item.items() if k not in later
        }
        item.update({name: event["item"][name] for name in later & event["item"].keys()})
    elif what in KEYS:
        key = KEYS[what]
        if step == "delta":
            assert event["delta"]
            item[key] += event["delta"]
        else:
            assert event[key] == item[key]
    elif step == "added":
        item["summary" if "summary" in what else "content"].append(event["part"])
    else:
        parts = item["summary" if "summary" in what else "content"]
        part = parts[event.get("content_index", event.get("summary_index"))]
        _apply_to_part(step, event, part)


def _apply_to_part(step: str, event: dict[str, Any], part: dict[str, Any]) -> None:
    if step == "delta":
        part["text"] += event["delta"]
        if "logprobs" in event:
            part["logprobs"] = part["logprobs"] + event["logprobs"]
    else:
        assert event.get("part", part) == part
        assert event.get("text", part["text"]) == part["text"]
        assert event.get("logprobs", part.get("logprobs")) == part.get("logprobs")
