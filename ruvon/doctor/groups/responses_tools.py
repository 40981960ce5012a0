"""Tools of the Responses API: what is called, with what, and what comes back."""

from __future__ import annotations

from typing import Any

from ruvon.doctor.ask import refusal, user
from ruvon.doctor.check import collect
from ruvon.doctor.expect import expect, expect_equal, expect_shape, not_empty
from ruvon.doctor.groups.responses import TOOLS, post, respond
from ruvon.doctor.groups.tools import SCHEMAS, check_arguments
from ruvon.doctor.probe import Probe

CALL = {
    "id": not_empty,
    "type": "function_call",
    "call_id": not_empty,
    "name": not_empty,
    "arguments": str,
    "status": ("completed", "incomplete"),
}
REQUIRED: dict[str, Any] = {
    "input": "What is the weather in Lisbon?", "tools": TOOLS, "tool_choice": "required",
    "max_output_tokens": 160,
}  # fmt: skip


def calls_of(response: Any, kind: str = "function_call") -> list[Any]:
    """The calls of a response; there must be some."""
    found = [item for item in response["output"] if item["type"] == kind]
    expect(found, f"an item of type {kind}", response["output"])
    return found


async def tools_echoed(probe: Probe) -> None:
    """Tools come back in the response."""
    found = await respond(probe, tools=TOOLS, tool_choice="auto")
    expect_equal([tool["name"] for tool in found["tools"]], list(SCHEMAS), "tools")


async def tools_empty(probe: Probe) -> None:
    """No tools with tool_choice auto is nothing special."""
    await respond(probe, tools=[], tool_choice="auto")


async def function_call(probe: Probe) -> None:
    """A call is an item with id, call_id, name, arguments and status."""
    expect_shape(calls_of(await respond(probe, **REQUIRED)), [CALL], "calls")


async def function_call_ids(probe: Probe) -> None:
    """Its ids begin with fc_ and call_."""
    for item in calls_of(await respond(probe, **REQUIRED)):
        fits = item["id"].startswith("fc_") and item["call_id"].startswith("call_")
        expect(fits, "fc_… and call_…", item)


async def function_call_arguments(probe: Probe) -> None:
    """Its arguments fit the schema."""
    for item in calls_of(await respond(probe, **REQUIRED)):
        if item["status"] == "completed":
            check_arguments(item["name"], item["arguments"])


async def function_named(probe: Probe) -> None:
    """A function that tool_choice names is called."""
    choice = {"type": "function", "name": "take_note"}
    found = calls_of(await respond(probe, **(REQUIRED | {"tool_choice": choice})))
    expect_equal({item["name"] for item in found}, {"take_note"}, "names")


async def not_parallel(probe: Probe) -> None:
    """parallel_tool_calls false gives one call."""
    found = calls_of(await respond(probe, **REQUIRED, parallel_tool_calls=False))
    expect_equal(len(found), 1, "calls")


def _turn(output: Any) -> list[Any]:
    call = {"type": "function_call", "call_id": "call_1", "name": "get_weather",
            "arguments": '{"city":"Lisbon","unit":"celsius"}'}  # fmt: skip
    result = {"type": "function_call_output", "call_id": "call_1", "output": output}
    return [*user("What is the weather in Lisbon?"), call, result]


async def function_output(probe: Probe) -> None:
    """A call and its output are input items."""
    await respond(probe, input=_turn("21 degrees"), tools=TOOLS)


async def function_output_parts(probe: Probe) -> None:
    """An output may be parts of type input_text."""
    await respond(probe, input=_turn([{"type": "input_text", "text": "21"}]), tools=TOOLS)


async def custom_tool(probe: Probe) -> None:
    """A custom tool is called with text as its grammar says."""
    form = {"type": "grammar", "syntax": "regex", "definition": "[a-d]{3}[0-9]"}
    tool = {"type": "custom", "name": "dial", "format": form}
    found = await respond(probe, **(REQUIRED | {"tools": [tool]}))
    call = calls_of(found, "custom_tool_call")[0]
    expect_shape(call, {"id": not_empty, "call_id": not_empty, "name": "dial", "input": str})


async def namespace_tools(probe: Probe) -> None:
    """Tools in a namespace are taken."""
    space = {"type": "namespace", "name": "notes", "description": "Notes.", "tools": [TOOLS[1]]}
    await respond(probe, tools=[space])


async def hosted_tools_refused(probe: Probe) -> None:
    """A tool that the server would have to run is refused by name, or left to the client."""
    reply = await post(probe, tools=[{"type": "code_interpreter", "container": {"type": "auto"}}])
    if reply.status != 200:
        await respond(probe)
        refusal(reply, 400, 422, 501, names="code_interpreter")


CHECKS = collect("responses", globals())
