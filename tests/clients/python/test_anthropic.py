"""Anthropic's Python client, strictly validated."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import anthropic
import pytest
from pydantic import BaseModel

MODEL = "scripted"
STRICT = {"api_key": "none", "max_retries": 0, "_strict_response_validation": True}
ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    },
}
CALL = 'call: add {"a":1,"b":2}'


def ask(text: str, **fields: object) -> dict[str, object]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "max_tokens": 512, "messages": messages, **fields}


@pytest.fixture
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, **STRICT) as opened:
        yield opened


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).type == "model"


def test_message(client):
    answer = client.messages.create(**ask("say: Good morning", system="Obey."))
    assert (answer.role, answer.stop_reason) == ("assistant", "end_turn")
    assert [block.text for block in answer.content] == ["Good morning"]
    assert answer.usage.input_tokens > 0 < answer.usage.output_tokens


def test_stream(client):
    kinds = [event.type for event in client.messages.create(**ask("say: one two"), stream=True)]
    assert [kinds[0], *kinds[-3:]] == [
        "message_start", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip


def test_stream_helper(client):
    with client.messages.stream(**ask("say: one two")) as stream:
        assert "".join(stream.text_stream) == "one two"
        assert stream.get_final_message().content[0].text == "one two"


def test_system_blocks_and_cache_control(client):
    cached = {"type": "ephemeral"}
    blocks = [
        {"type": "text", "text": "x-anthropic-billing-header: cch=1;"},
        {"type": "text", "text": "Obey.", "cache_control": cached},
    ]
    content = [{"type": "text", "text": "say: fine", "cache_control": cached}]
    counts = []
    for stamp in "12":
        blocks[0]["text"] = f"x-anthropic-billing-header: cch={stamp};"
        answer = client.messages.create(**ask(content, system=blocks))
        counts.append(answer.usage.cache_read_input_tokens or 0)
        assert answer.content[0].text == "fine"
    assert counts[1] >= counts[0]


@pytest.mark.parametrize("choice", ["auto", "any", "tool"])
def test_tool_loop(client, choice):
    wanted = {"type": choice} | ({"name": "add"} if choice == "tool" else {})
    first = client.messages.create(**ask(CALL, tools=[ADD], tool_choice=wanted))
    assert first.stop_reason == "tool_use"
    (call,) = first.content
    assert (call.type, call.name, call.input) == ("tool_use", "add", {"a": 1, "b": 2})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "3"}
    history = [
        {"role": "user", "content": CALL},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = client.messages.create(model=MODEL, max_tokens=64, messages=history, tools=[ADD])
    assert second.content[0].text == "It says 3"


def test_tools_streamed(client):
    with client.messages.stream(**ask(CALL + '\ncall: add {"a":3,"b":4}', tools=[ADD])) as stream:
        events = list(stream)
        calls = stream.get_final_message().content
    assert any(event.type == "input_json" for event in events)
    assert [call.input for call in calls] == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]


def test_parse(client):
    class Person(BaseModel):
        name: str
        age: int

    answer = client.messages.parse(**ask('say: {"name":"Ann","age":30}'), output_format=Person)
    assert answer.parsed_output == Person(name="Ann", age=30)


def test_stop_sequence_and_length(client):
    stopped = client.messages.create(**ask("say: one two three", stop_sequences=[" two"]))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " two")
    short = client.messages.create(**ask("say: one two three four") | {"max_tokens": 2})
    assert short.stop_reason == "max_tokens"


def test_count_tokens(client):
    counted = client.messages.count_tokens(
        model=MODEL, messages=[{"role": "user", "content": CALL}], tools=[ADD]
    )
    answer = client.messages.create(**ask(CALL, tools=[ADD]))
    cached = answer.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == answer.usage.input_tokens + cached


def test_errors(client):
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(**ask("Hi") | {"model": "claude-opus-4"})
    assert unknown.value.body["error"]["type"] == "not_found_error"
    assert unknown.value.request_id
    with pytest.raises(anthropic.BadRequestError) as bad:
        client.messages.create(**ask("Hi"), extra_body={"temperature": 9})
    assert bad.value.body["error"]["type"] == "invalid_request_error"


def test_async(url):
    async def work() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=url, **STRICT) as client,
            client.messages.stream(**ask("say: one two")) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(work()) == "one two"
