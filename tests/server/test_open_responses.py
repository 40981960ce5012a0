"""Open Responses (openresponses.org, 2026-04-24): its compliance cases, events and fields, by name.

The suite of the specification is in TypeScript and asks a model that answers well. These are its
requests, asked of a scripted model and held against the same rules.
"""

from __future__ import annotations

from typing import Any

import pytest
from response_events import EVENTS, check_response, check_stream, parse_events
from test_responses_writer import ALL_KINDS, streamed, writer

from ruvon.deltas import Delta
from ruvon.errors import GenerationError

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "The city and state"}},
        "required": ["location"],
    },
}
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
FILE = {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBE"}


def user(content: Any) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": content}


def said(role: str, content: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


def with_part(part: dict[str, str]) -> dict[str, Any]:
    return {"input": [user([{"type": "input_text", "text": "What is this?"}, part])]}


ASK = {"input": [user("What's the weather like in San Francisco?")], "tools": [WEATHER]}

SERVED: dict[str, dict[str, Any]] = {
    "basic-response": {"input": [user("Say hello in exactly 3 words.")]},
    "streaming-response": {"input": [user("Count from 1 to 5.")], "stream": True},
    "system-prompt": {"input": [said("system", "You are a pirate."), user("Say hello.")]},
    "tool-calling": ASK,
    "tool-calling-streaming": ASK | {"stream": True},
    "multi-turn": {
        "input": [
            user("My name is Alice."),
            said("assistant", "Hello Alice!"),
            user("What is my name?"),
        ]
    },
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "image-input": (with_part(IMAGE), "input[0].content[1]"),
    "file-input": (with_part(FILE), "input[0].content[1]"),
    "file-search": (
        {
            "input": "Search.",
            "tools": [{"type": "file_search", "vector_store_ids": ["vs"]}],
            "tool_choice": {"type": "file_search"},
            "include": ["file_search_call.results"],
        },
        "tools[0]",
    ),
    "offline-web-search": (
        {
            "input": "Search.",
            "tools": [{"type": "web_search", "external_web_access": False}],
            "tool_choice": {"type": "web_search"},
            "include": ["web_search_call.action.sources"],
        },
        "tools[0]",
    ),
}
"""Cases for models that see, and for servers with tools of their own: a 400 that names it."""
LOOPS = ("function-call-roundtrip", "previous-response-id")

FIELDS = {
    "id": str, "object": str, "created_at": int, "completed_at": int | None, "status": str,
    "incomplete_details": dict | None, "model": str, "previous_response_id": str | None,
    "instructions": str | None, "output": list, "error": dict | None, "tools": list,
    "tool_choice": str | dict, "truncation": str, "parallel_tool_calls": bool, "text": dict,
    "top_p": float, "presence_penalty": float, "frequency_penalty": float, "top_logprobs": int,
    "temperature": float, "reasoning": dict | None, "usage": dict | None,
    "max_output_tokens": int | None, "max_tool_calls": int | None, "store": bool,
    "background": bool, "service_tier": str, "metadata": dict, "safety_identifier": str | None,
    "prompt_cache_key": str | None,
}  # fmt: skip
"""The 31 fields of a ResponseResource, all of them required."""


def script(prompt: str) -> str:
    if "<tools>" not in prompt or "<tool_response>" in prompt:
        return "Ahoy there, matey!"
    return '<tool_call>\n{"name": "get_weather", "arguments": {"location": "SF"}}\n</tool_call>'


def check_resource(response: Any) -> None:
    check_response(response)
    assert FIELDS.keys() <= response.keys()
    for name, kind in FIELDS.items():
        assert isinstance(response[name], kind), name
    assert response["output"]


async def ask(server: Any, fields: dict[str, Any]) -> Any:
    reply = await server.post("/v1/responses", {"model": "org/fake", **fields})
    assert reply.status == 200, reply.body
    events = parse_events(reply.body) if fields.get("stream") else []
    response = check_stream(events) if events else reply.json
    check_resource(response)
    return response, events


@pytest.mark.parametrize("case", SERVED)
async def test_case_that_is_served(serve, case):
    server = await serve(script, numbers={"max_model_len": 4096})
    response, events = await ask(server, SERVED[case])
    assert response["status"] == "completed"
    if "tools" in SERVED[case]:
        assert response["output"][-1]["type"] == "function_call"
    if "tools" in SERVED[case] and events:
        kinds = [event["type"] for event in events]
        assert "response.function_call_arguments.delta" in kinds
        assert "response.function_call_arguments.done" in kinds
        for step in ("added", "done"):
            (item,) = [e["item"] for e in events if e["type"] == f"response.output_item.{step}"]
            assert item["type"] == "function_call"


@pytest.mark.parametrize("case", REFUSED)
async def test_case_that_is_refused_by_name(serve, case):
    server = await serve(script)
    fields, param = REFUSED[case]
    reply = await server.post("/v1/responses", fields)
    assert (reply.status, reply.error["param"]) == (400, param)


@pytest.mark.parametrize("case", LOOPS)
async def test_case_of_several_requests(serve, case):
    server = await serve(script, numbers={"max_model_len": 4096})
    first, _ = await ask(server, ASK if case == LOOPS[0] else SERVED["basic-response"])
    then = [user("And now?")]
    if case == LOOPS[0]:
        call = first["output"][-1]
        then = [{"type": "function_call_output", "call_id": call["call_id"], "output": "18 C"}]
    second, _ = await ask(
        server, {"input": then, "previous_response_id": first["id"], "tools": [WEATHER]}
    )
    assert second["status"] == "completed"
    if case == LOOPS[0]:
        assert second["output"][-1]["type"] == "message"


# ---------------------------------------------------------------------- the 24 events

GIVEN = {
    "response.created", "response.queued", "response.in_progress", "response.completed",
    "response.failed", "response.incomplete", "response.output_item.added",
    "response.output_item.done", "response.content_part.added", "response.content_part.done",
    "response.output_text.delta", "response.output_text.done",
    "response.reasoning_summary_part.added", "response.reasoning_summary_part.done",
    "response.reasoning_summary_text.delta", "response.reasoning_summary_text.done",
    "response.function_call_arguments.delta", "response.function_call_arguments.done", "error",
}  # fmt: skip
OTHERWISE = {
    "response.reasoning.delta": "response.reasoning_text.delta",
    "response.reasoning.done": "response.reasoning_text.done",
}
"""Under the name that OpenAI's package and Codex read."""
NEVER = {
    "response.refusal.delta", "response.refusal.done",  # nothing tells a refusal from a text
    "response.output_text.annotation.added",  # there is nothing to cite
}  # fmt: skip


def test_events():
    events = streamed(writer(summary=True, background=True), ALL_KINDS)
    events += streamed(writer(), [Delta(text="a"), Delta(finish="length")])
    failed = writer()
    events += parse_events(failed.opening() + failed.error(GenerationError("NaN")))
    kinds = {event["type"] for event in events}
    assert kinds >= GIVEN | set(OTHERWISE.values())
    beyond = {"response.custom_tool_call_input.delta", "response.custom_tool_call_input.done"}
    assert kinds - GIVEN - set(OTHERWISE.values()) == beyond
    assert len(GIVEN | OTHERWISE.keys() | NEVER) == 24
    assert kinds <= EVENTS.keys()
