"""Requests of many fields at once, of a model that writes whatever its grammar allows."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import orjson
import pytest
from fakes import FakeRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from serving import END, Reply, Server, byte_grammars, open_server

from ruvon.engine.matching import Matchers

ALPHABET = (*b'{}[]",:0129 aeimnt.-\n', END)
REGEX = {"syntax": "regex", "definition": "[ab]{2}"}
KEYS = st.sampled_from(["a", "b", "é", "tool_call", '"'])

leaves = st.sampled_from(
    [
        {"type": "integer", "minimum": 0, "maximum": 20},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["a", "</tool_call>", 'b"c']},
        {"const": {"a": [1, None]}},
        {"type": "string", "maxLength": 3},
        {"type": "string", "pattern": "^[a-c]{1,3}$"},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"$ref": "#/$defs/none"},  # refused
        {"type": "string", "format": "nonsense"},  # refused
        {},
    ]
)


def objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(
        lambda properties, more: {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": more,
        },
        st.dictionaries(KEYS, values, max_size=3),
        st.sampled_from([False, False, {"type": "null"}]),
    )


schemas = st.recursive(
    leaves,
    lambda inner: (
        objects(inner)
        | st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner)
        | st.lists(inner, min_size=1, max_size=2).map(lambda kinds: {"anyOf": kinds})
    ),
    max_leaves=4,
)
functions = st.builds(
    lambda name, schema, strict: {
        "type": "function",
        "function": {"name": name, "parameters": schema, "strict": strict},
    },
    st.sampled_from("fg"),
    objects(leaves),
    st.booleans(),
)
customs = st.sampled_from(
    [
        {"type": "custom", "custom": {"name": "c"}},
        {
            "type": "custom",
            "custom": {
                "name": "d",
                "format": {"type": "grammar", "grammar": REGEX},
            },
        },
    ]
)  # fmt: skip
choices = st.sampled_from(
    [
        None, "none", "auto", "required", {"type": "function", "function": {"name": "f"}},
        {"type": "custom", "custom": {"name": "d"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
            {"type": "function", "function": {"name": "g"}}]}},
    ]
)  # fmt: skip
constraints = st.one_of(
    st.just({}),
    schemas.map(lambda schema: {"guided_json": schema}),
    schemas.map(lambda s: {"response_format": {"type": "json_object", "schema": s}}),
    st.just({"response_format": {"type": "json_object"}}),
    st.just({"structured_outputs": {"choice": ["a", "ab", "é\n"]}}),
    st.just({"regex": "a{2,4}|<tool_call>"}),
    st.just({"grammar": 'root ::= "a" [0-9]+ | "b"'}),
)  # fmt: skip
extras = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 2),
        "logprobs": st.booleans(),
        "stop": st.sampled_from(["a", "\n", '"}']),
        "max_tokens": st.integers(1, 60),
        "min_tokens": st.just(1),
        "ignore_eos": st.booleans(),
        "parallel_tool_calls": st.booleans(),
        "include_reasoning": st.booleans(),
        "return_token_ids": st.booleans(),
        "truncate_prompt_tokens": st.integers(1, 9),
        "skip_special_tokens": st.booleans(),
        "continue_final_message": st.just(False),
        "thinking_budget": st.integers(0, 3),
        "repetition_penalty": st.just(1.3),
    },
)
requests = st.builds(
    lambda tools, choice, constraint, extra: {
        "messages": [{"role": "user", "content": "<|im_end|> é"}],
        "max_tokens": 60,
        "seed": 1,
        "tools": tools,
        "tool_choice": choice,
        **constraint,
        **extra,
    },
    st.lists(functions | customs, max_size=2),
    choices,
    constraints,
    extras,
)


@pytest.fixture(scope="module")
def live() -> Iterator[Any]:
    """A function that asks a server, which runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait_for(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    runner = FakeRunner(alphabet=ALPHABET, matchers=Matchers(byte_grammars()))
    numbers = {"max_model_len": 4096}
    server: Server = wait_for(open_server(runner=runner, numbers=numbers))
    yield lambda body: wait_for(server.post("/v1/chat/completions", body))
    wait_for(server.until(lambda: server.idle))
    wait_for(server.stack.aclose())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True)
@given(requests)
def test_whatever_is_asked_is_given_or_refused(live, body):
    whole: Reply = live(body)
    if whole.status == 400:
        assert whole.error["param"], whole.body
        assert live(body | {"stream": True}).error == whole.error
        return
    assert whole.status == 200, whole.body
    assert put_together(live(body | {"stream": True})) == [seen(c) for c in whole.json["choices"]]
    for choice in whole.json["choices"]:
        check(choice, body)


def seen(choice: Mapping[str, Any]) -> Any:
    """A choice without ids, which are new each time."""
    message = choice["message"]
    calls = [call[call["type"]] for call in message.get("tool_calls", ())]
    return (message["content"] or "", calls, choice["finish_reason"])


def put_together(stream: Reply) -> list[Any]:
    """What a stream says in the end, as `seen`."""
    said: dict[int, Any] = {}
    for event in stream.events:
        for choice in event["choices"]:
            text, calls, _ = said.get(choice["index"], ("", [], None))
            delta = choice["delta"]
            for piece in delta.get("tool_calls", ()):
                kind = "custom" if "custom" in piece else "function"
                if "id" in piece:
                    calls = [*calls, piece[kind]]
                else:
                    ((key, more),) = piece[kind].items()
                    calls[piece["index"]][key] += more
            text += delta.get("content", "")
            said[choice["index"]] = (text, calls, choice["finish_reason"])
    return [said[index] for index in sorted(said)]


def check(choice: Mapping[str, Any], body: Mapping[str, Any]) -> None:
    """What is complete is what was asked for."""
    message, calls = choice["message"], choice["message"].get("tool_calls", [])
    if choice["finish_reason"] == "length" or choice["stop_reason"] is not None:
        return
    schemas = {
        tool["function"]["name"]: tool["function"]["parameters"]
        for tool in body["tools"]
        if tool["type"] == "function"
    }
    constrained = body["tool_choice"] not in (None, "auto", "none")
    if constrained:
        assert calls
    for call in calls if constrained else ():
        if call["type"] == "function":
            arguments = json.loads(call["function"]["arguments"])
            Draft202012Validator(schemas[call["function"]["name"]]).validate(arguments)
    if not calls and "guided_json" in body:
        Draft202012Validator(body["guided_json"]).validate(orjson.loads(message["content"]))
