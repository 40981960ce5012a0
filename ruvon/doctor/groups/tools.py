"""Tools: what is called, and that it can be."""

from __future__ import annotations

import re
from typing import Any

from ruvon.doctor.ask import chat, parse, post_chat, refusal, user
from ruvon.doctor.check import collect, optional
from ruvon.doctor.expect import Failed, expect, expect_equal, expect_shape, not_empty
from ruvon.doctor.probe import Probe
from ruvon.doctor.schema import violation
from ruvon.doctor.schemas import SHORT, array, closed

WEATHER = closed(city=SHORT, unit={"type": "string", "enum": ["celsius", "fahrenheit"]})
NOTE = closed(text=SHORT)
SCHEMAS = {"get_weather": WEATHER, "take_note": NOTE}


def function(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    """A tool."""
    body = {"name": name, "description": f"Calls {name}.", **more}
    return {
        "type": "function",
        "function": body | ({"parameters": parameters} if parameters else {}),
    }


def named(name: str) -> dict[str, Any]:
    """``tool_choice`` of one function."""
    return {"type": "function", "function": {"name": name}}


TOOLS = [function(name, schema) for name, schema in SCHEMAS.items()]
ASK: dict[str, Any] = {
    "messages": user("What is the weather in Lisbon?"), "max_tokens": 160, "tools": TOOLS
}  # fmt: skip
REQUIRED = ASK | {"tool_choice": "required"}
WEATHER_ONLY = ASK | {"tool_choice": named("get_weather")}
CALL = {"id": not_empty, "type": "function", "function": {"name": not_empty, "arguments": str}}


async def _message(probe: Probe, fields: Any, again: int = 0) -> Any:
    found = await chat(probe, again, **fields)
    expect_shape(found, {"choices": [{"message": {"role": "assistant"}}]})
    return found["choices"][0]["message"]


async def _calls(probe: Probe, fields: Any) -> list[Any]:
    """The calls of an answer that must have some."""
    message = await _message(probe, fields)
    expect_shape(message, {"tool_calls": list}, "message")
    expect(message["tool_calls"], "a call", message)
    calls: list[Any] = message["tool_calls"]
    return calls


def check_arguments(name: str, arguments: str, schemas: Any = SCHEMAS) -> None:
    """They are JSON and fit the tool's schema."""
    expect(name in schemas, f"one of {', '.join(schemas)}", name)
    if wrong := violation(parse(arguments), schemas[name]):
        raise Failed(f"{wrong} in {arguments}")


async def auto(probe: Probe) -> None:
    """Tools with tool_choice auto are taken; the answer has content or calls."""
    message = await _message(probe, ASK | {"max_tokens": 32, "tool_choice": "auto"})
    expect(message.get("content") is not None or message.get("tool_calls"), "either", message)


async def auto_is_default(probe: Probe) -> None:
    """auto is the default."""
    plain = await _message(probe, ASK | {"max_tokens": 16})
    chosen = await _message(probe, ASK | {"max_tokens": 16, "tool_choice": "auto"})
    expect_equal(plain.get("content"), chosen.get("content"), "the content")


async def none(probe: Probe) -> None:
    """tool_choice none calls nothing."""
    message = await _message(probe, ASK | {"max_tokens": 32, "tool_choice": "none"})
    expect(not message.get("tool_calls"), "no calls", message)


async def required(probe: Probe) -> None:
    """tool_choice required calls one at least."""
    await _calls(probe, REQUIRED)


async def call_shape(probe: Probe) -> None:
    """A call has id, type, name and arguments, a string."""
    expect_shape(await _calls(probe, REQUIRED), [CALL], "tool_calls")


async def call_id_prefix(probe: Probe) -> None:
    """Its id begins with call_."""
    for call in await _calls(probe, REQUIRED):
        expect(call["id"].startswith("call_"), "call_…", call["id"])


async def call_ids_unique(probe: Probe) -> None:
    """No two calls of two answers have one id."""
    first = await _message(probe, REQUIRED)
    second = await _message(probe, REQUIRED, again=1)
    ids = [call["id"] for message in (first, second) for call in message["tool_calls"]]
    expect_equal(len(set(ids)), len(ids), "different ids")


async def required_finish(probe: Probe) -> None:
    """The finish_reason is tool_calls then."""
    found = await chat(probe, **REQUIRED)
    expect_equal(found["choices"][0]["finish_reason"], "tool_calls", "finish_reason")


async def content_null(probe: Probe) -> None:
    """An answer of calls alone has null as content."""
    message = await _message(probe, REQUIRED)
    expect(message.get("content") in (None, ""), "null", message.get("content"))


async def arguments(probe: Probe) -> None:
    """Arguments fit the schema of the tool that is called."""
    for call in await _calls(probe, REQUIRED):
        check_arguments(call["function"]["name"], call["function"]["arguments"])


async def named_function(probe: Probe) -> None:
    """A function that tool_choice names is called, and no other."""
    names = {call["function"]["name"] for call in await _calls(probe, WEATHER_ONLY)}
    expect_equal(names, {"get_weather"}, "names")


async def named_arguments(probe: Probe) -> None:
    """Its arguments fit its schema."""
    for call in await _calls(probe, WEATHER_ONLY):
        check_arguments("get_weather", call["function"]["arguments"])


async def named_finish(probe: Probe) -> None:
    """The finish_reason is then stop or tool_calls."""
    found = (await chat(probe, **WEATHER_ONLY))["choices"][0]["finish_reason"]
    expect(found in ("stop", "tool_calls"), "stop or tool_calls", found)


async def second_function(probe: Probe) -> None:
    """Any of them can be named, not only the first."""
    calls = await _calls(probe, ASK | {"tool_choice": named("take_note")})
    expect_equal({call["function"]["name"] for call in calls}, {"take_note"}, "names")


async def allowed_tools(probe: Probe) -> None:
    """allowed_tools narrows the choice."""
    allowed = {"mode": "required", "tools": [named("take_note")]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    calls = await _calls(probe, ASK | {"tool_choice": choice})
    expect_equal({call["function"]["name"] for call in calls}, {"take_note"}, "names")


async def not_parallel(probe: Probe) -> None:
    """parallel_tool_calls false gives one call at most."""
    calls = await _calls(probe, REQUIRED | {"parallel_tool_calls": False})
    expect_equal(len(calls), 1, "calls")


async def strict(probe: Probe) -> None:
    """A strict tool is taken, and its arguments fit."""
    tool = function("get_weather", WEATHER, strict=True)
    for call in await _calls(probe, REQUIRED | {"tools": [tool]}):
        check_arguments("get_weather", call["function"]["arguments"])


async def strict_schema_refused(probe: Probe) -> None:
    """A strict tool whose schema is not closed is a 400 that names the keyword."""
    open_schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    tool = function("f", open_schema, strict=True)
    await chat(probe, **(ASK | {"max_tokens": 4}))
    error = refusal(await post_chat(probe, **(ASK | {"tools": [tool]})))
    told = f"{error.get('param')} {error['message']}"
    expect("additionalProperties" in told, "additionalProperties", error)


async def without_parameters(probe: Probe) -> None:
    """A tool without parameters can be called; its arguments are an object."""
    fields = REQUIRED | {"tools": [function("wave")], "max_tokens": 64}
    calls = await _calls(probe, fields)
    finish = (await chat(probe, **fields))["choices"][0]["finish_reason"]
    if finish != "length":
        expect_shape(parse(calls[0]["function"]["arguments"]), dict, "arguments")


async def nested_arguments(probe: Probe) -> None:
    """Arguments may be nested: arrays, enums, numbers within bounds."""
    schema = closed(
        points=array(closed(x={"type": "integer", "minimum": 0, "maximum": 9}), maxItems=2),
        mode={"type": "string", "enum": ["a", "b"]},
    )
    fields = REQUIRED | {"tools": [function("plot", schema)]}
    for call in await _calls(probe, fields):
        check_arguments("plot", call["function"]["arguments"], {"plot": schema})


async def unicode_arguments(probe: Probe) -> None:
    """Names of arguments may be of any script."""
    schema = closed(größe={"type": "integer", "maximum": 99}, 色={"enum": ["赤", "青"]})
    for call in await _calls(probe, REQUIRED | {"tools": [function("paint", schema)]}):
        check_arguments("paint", call["function"]["arguments"], {"paint": schema})


async def custom_tool(probe: Probe) -> None:
    """A custom tool is called with text."""
    tool = {"type": "custom", "custom": {"name": "shout", "description": "Shouts."}}
    fields = {"tools": [tool], "tool_choice": "required", "max_tokens": 32}
    calls = await _calls(probe, ASK | fields)
    expect_shape(calls[0], {"id": not_empty, "type": "custom", "custom": {"input": str}}, "call")


async def custom_tool_regex(probe: Probe) -> None:
    """A custom tool's text is as its regex says."""
    found = await _input_within(probe, {"syntax": "regex", "definition": "[a-d]{3}[0-9]"})
    expect(re.fullmatch("[a-d]{3}[0-9]", found), "three letters and a digit", found)


async def custom_tool_lark(probe: Probe) -> None:
    """A custom tool's text is as its Lark grammar says."""
    definition = 'start: "go " ("left" | "right")'
    found = await _input_within(probe, {"syntax": "lark", "definition": definition})
    expect(found in ("go left", "go right"), "go left or go right", found)


async def _input_within(probe: Probe, grammar: dict[str, str]) -> str:
    """What a custom tool of this grammar is called with."""
    custom = {"name": "steer", "format": {"type": "grammar", "grammar": grammar}}
    fields = {"tools": [{"type": "custom", "custom": custom}], "tool_choice": "required"}
    call = (await _calls(probe, ASK | fields | {"max_tokens": 48}))[0]
    return str(call["custom"]["input"])


async def result(probe: Probe) -> None:
    """A result goes back, with the tools still offered."""
    call = {"id": "call_1", **named("get_weather")}
    call["function"] |= {"arguments": '{"city":"Lisbon","unit":"celsius"}'}
    messages = [
        *user("What is the weather in Lisbon?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees, sunny"},
    ]
    message = await _message(probe, ASK | {"messages": messages, "max_tokens": 16})
    expect(message.get("content") is not None or message.get("tool_calls"), "an answer", message)


async def several_results(probe: Probe) -> None:
    """Results of parallel calls go back in any order."""
    note = {"name": "take_note", "arguments": '{"text":"a"}'}
    calls = [{"id": f"call_{k}", "type": "function", "function": note} for k in (1, 2)]
    results = [{"role": "tool", "tool_call_id": f"call_{k}", "content": "done"} for k in (2, 1)]
    messages = [*user("Note a twice."), {"role": "assistant", "tool_calls": calls}, *results]
    await _message(probe, ASK | {"messages": messages, "max_tokens": 8})


async def tools_count_as_prompt(probe: Probe) -> None:
    """The model is told of the tools: they are part of the prompt."""
    fields = ASK | {"max_tokens": 4}
    offered = (await chat(probe, **fields))["usage"]["prompt_tokens"]
    plain = (await chat(probe, messages=ASK["messages"], max_tokens=4))["usage"]["prompt_tokens"]
    expect(offered > plain, f"more than {plain} prompt tokens", offered)


async def max_tokens(probe: Probe) -> None:
    """Calls that max_tokens cuts off end with length."""
    found = await chat(probe, **(REQUIRED | {"max_tokens": 4}))
    expect_equal(found["choices"][0]["finish_reason"], "length", "finish_reason")


async def n(probe: Probe) -> None:
    """Each of n choices has calls of its own."""
    found = await chat(probe, **(REQUIRED | {"n": 2, "temperature": 1, "seed": 3}))
    ids = [call["id"] for c in found["choices"] for call in c["message"]["tool_calls"]]
    expect(len(found["choices"]) == 2 and len(set(ids)) == len(ids) >= 2, "two calls", ids)


async def functions_in_the_old_way(probe: Probe) -> None:
    """functions, the old name, are served or refused by name, not passed over."""
    old: dict[str, Any] = {
        "functions": [TOOLS[0]["function"]],
        "function_call": {"name": "get_weather"},
    }
    reply = await post_chat(probe, messages=ASK["messages"], max_tokens=64, **old)
    if reply.status == 200:
        expect("function_call" in reply.json["choices"][0]["message"], "function_call", "none")
    else:
        refusal(reply, 400, 422, 501, names="function")


async def _refused(probe: Probe, names: str, **fields: Any) -> None:
    await chat(probe, **(ASK | {"max_tokens": 4}))  # skips where no tools are served
    refusal(await post_chat(probe, **(ASK | {"max_tokens": 4} | fields)), names=names)


async def name_missing(probe: Probe) -> None:
    """A function without a name is a 400 that names its place."""
    await _refused(probe, "name", tools=[{"type": "function", "function": {}}])


async def function_missing(probe: Probe) -> None:
    """A tool without a function is a 400."""
    await _refused(probe, "function", tools=[{"type": "function"}])


async def type_unknown(probe: Probe) -> None:
    """A tool of a type that nobody knows is a 400 that names it."""
    await _refused(probe, "type", tools=[{"type": "telepathy", "telepathy": {}}])


async def name_wrong(probe: Probe) -> None:
    """A name of other characters than letters, digits, - and _ is a 400."""
    await _refused(probe, "name", tools=[function("no name!")])


async def parameters_wrong(probe: Probe) -> None:
    """Parameters that are no schema are a 400 that names the tools."""
    bad = function("f", {"type": "strin"})
    await _refused(probe, "tools", tools=[bad], tool_choice="required")


async def named_unknown(probe: Probe) -> None:
    """A tool_choice that names no tool is a 400."""
    await _refused(probe, "tool_choice", tool_choice=named("no_such_tool"))


async def choice_wrong(probe: Probe) -> None:
    """A tool_choice that means nothing is a 400."""
    await _refused(probe, "tool_choice", tool_choice="perhaps")


async def choice_without_tools(probe: Probe) -> None:
    """required without tools is a 400."""
    await _refused(probe, "tool_choice", tools=None, tool_choice="required")


@optional
async def no_markup(probe: Probe) -> None:
    """Content holds no markup of calls."""
    message = await _message(probe, REQUIRED)
    expect("<tool_call>" not in (message.get("content") or ""), "no <tool_call>", message)


CHECKS = collect("tools", globals())
