"""The official Python client: strictly validated, over each of its transports."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import openai
import pytest
from pydantic import BaseModel

MODEL = "scripted"
STRICT = {"api_key": "none", "max_retries": 0, "_strict_response_validation": True}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
CALL = 'call: add {"a": 1, "b": 2}'


class Person(BaseModel):
    name: str
    age: int


ANN = Person(name="Ann", age=30)
SAY_ANN = 'say: {"name":"Ann","age":30}'


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask(text: str) -> dict[str, object]:
    return {"model": MODEL, "messages": user(text)}


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url + "/v1", **STRICT) as opened:
        yield opened


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by


# -------------------------------------------------------------------------------- chat


def test_chat(client):
    answer = client.chat.completions.create(**ask("say: Good morning"), n=2, seed=1)
    assert [c.message.content for c in answer.choices] == ["Good morning"] * 2
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**ask("say: one two three"), **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "one two three"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 0


def test_chat_stream_helper(client):
    with client.chat.completions.stream(**ask("say: one two"), logprobs=True) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.done"} <= kinds
    assert final.choices[0].message.content == "one two"


def test_chat_parse(client):
    answer = client.chat.completions.parse(**ask(SAY_ANN), response_format=Person)
    assert answer.choices[0].message.parsed == ANN


def test_chat_stream_parse(client):
    with client.chat.completions.stream(**ask(SAY_ANN), response_format=Person) as stream:
        assert any(event.type == "content.delta" and event.parsed for event in stream)
        assert stream.get_final_completion().choices[0].message.parsed == ANN


def test_chat_parse_tool(client):
    answer = client.chat.completions.parse(
        **ask('call: Person {"name": "Ann", "age": 30}'),
        tools=[openai.pydantic_function_tool(Person)],
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == ANN


@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "add"}}]
)
def test_chat_tool_loop(client, choice):
    first = client.chat.completions.create(**ask(CALL), tools=[ADD], tool_choice=choice)
    assert first.choices[0].finish_reason == "tool_calls"
    (call,) = first.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1, "b": 2})
    result = {"role": "tool", "tool_call_id": call.id, "content": "3"}
    history = [*user(CALL), first.choices[0].message, result]
    second = client.chat.completions.create(model=MODEL, messages=history, tools=[ADD])
    assert second.choices[0].message.content == "It says 3"


def test_chat_tools_streamed(client):
    two = CALL + '\ncall: add {"a": 3, "b": 4}'
    with client.chat.completions.stream(**ask(two), tools=[ADD]) as stream:
        events = list(stream)
        calls = stream.get_final_completion().choices[0].message.tool_calls
    done = [e for e in events if e.type == "tool_calls.function.arguments.done"]
    assert [json.loads(e.arguments)["a"] for e in done] == [1, 3]
    assert [call.function.name for call in calls] == ["add", "add"]
    assert len({call.id for call in calls}) == 2


def test_raw_and_streaming_responses(client):
    raw = client.chat.completions.with_raw_response.create(**ask("say: raw"))
    assert raw.headers["x-request-id"]
    assert raw.parse().choices[0].message.content == "raw"
    with client.chat.completions.with_streaming_response.create(**ask("say: raw")) as response:
        assert json.loads(response.read())["choices"][0]["message"]["content"] == "raw"


# -------------------------------------------------------------------------------- completions


def test_completions(client):
    answer = client.completions.create(model=MODEL, prompt="say: text", logprobs=2)
    assert answer.choices[0].text == "text"
    offsets = answer.choices[0].logprobs.text_offset
    assert offsets == sorted(offsets)


def test_completions_stream(url):
    """Not strictly validated: the client's own type has no chunk without a finish_reason."""
    pieces = {0: "", 1: ""}
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        asked = {"model": MODEL, "prompt": ["say: a", "say: b"], "stream": True}
        for chunk in client.completions.create(**asked):
            pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == {0: "a", 1: "b"}


# -------------------------------------------------------------------------------- responses

ADD_FLAT = {"type": "function", **ADD["function"]}


def test_responses(client):
    answer = client.responses.create(model=MODEL, input="say: Good evening", instructions="Obey.")
    assert (answer.status, answer.output_text) == ("completed", "Good evening")
    again = client.responses.retrieve(answer.id)
    assert again.output_text == "Good evening"
    assert [item.type for item in client.responses.input_items.list(answer.id)] == ["message"]
    follow = client.responses.create(
        model=MODEL, input="say: next", previous_response_id=answer.id, metadata={"a": "b"}
    )
    assert (follow.output_text, follow.metadata) == ("next", {"a": "b"})
    assert follow.usage.input_tokens > answer.usage.input_tokens
    client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_responses_stream(client):
    events = list(client.responses.create(model=MODEL, input="say: one two", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == "one two"


def test_responses_stream_helper(client):
    with client.responses.stream(model=MODEL, input=SAY_ANN, text_format=Person) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == ANN


def test_responses_parse(client):
    answer = client.responses.parse(model=MODEL, input=SAY_ANN, text_format=Person)
    assert answer.output_parsed == ANN


def test_responses_tool_loop(client):
    first = client.responses.create(model=MODEL, input=CALL, tools=[ADD_FLAT])
    (call,) = first.output
    assert (call.type, json.loads(call.arguments)) == ("function_call", {"a": 1, "b": 2})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "3"}
    history = [*user(CALL), *first.output, result]
    stateless = client.responses.create(model=MODEL, input=history, tools=[ADD_FLAT])
    stored = client.responses.create(
        model=MODEL, input=[result], previous_response_id=first.id, tools=[ADD_FLAT]
    )
    assert stateless.output_text == stored.output_text == "It says 3"


def test_responses_cut_short(client):
    answer = client.responses.create(
        model=MODEL, input="say: a b c d e f g h i j k l m n o p q r s t", max_output_tokens=16
    )
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")


# -------------------------------------------------------------------------------- the rest


def test_embeddings(client):
    plain = client.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
    assert [len(found.embedding) for found in plain.data] == [len(plain.data[0].embedding)] * 2


def test_embeddings_as_base64(url, client):
    """As it asks unless told otherwise; strictly validated, it would not take that itself."""
    plain = client.embeddings.create(model=MODEL, input="one", encoding_format="float")
    with openai.OpenAI(base_url=url + "/v1", api_key="none") as lenient:
        packed = lenient.embeddings.create(model=MODEL, input="one")
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)


def test_errors(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=user("Hi"))
    assert (unknown.value.code, bool(unknown.value.request_id)) == ("model_not_found", True)
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**ask("Hi"), temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as bad:
        client.responses.create(model=MODEL, input="Hi", temperature=9)
    assert bad.value.param == "temperature"


def test_async(url):
    async def work(**options: object) -> tuple[str, str, str]:
        async with openai.AsyncOpenAI(base_url=url + "/v1", **STRICT, **options) as client:
            whole = await client.chat.completions.create(**ask("say: whole"))
            chunks = await client.chat.completions.create(**ask("say: in parts"), stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in chunks])
            async with client.responses.stream(model=MODEL, input="say: events") as stream:
                final = await stream.get_final_response()
        return whole.choices[0].message.content, text, final.output_text

    assert asyncio.run(work()) == ("whole", "in parts", "events")


def test_async_over_aiohttp(url):
    pytest.importorskip("aiohttp")

    async def work() -> list[str | None]:
        async with openai.AsyncOpenAI(
            base_url=url + "/v1", http_client=openai.DefaultAioHttpClient(), **STRICT
        ) as client:
            whole = client.chat.completions.create(**ask("say: whole"))
            stream = await client.chat.completions.create(**ask("say: in parts"), stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
            early = await client.chat.completions.create(**ask("say: a b c d e"), stream=True)
            async for _ in early:
                break
            await early.close()
            return [(await whole).choices[0].message.content, text]

    assert asyncio.run(work()) == ["whole", "in parts"]
