"""The official OpenAI client, synchronous and asynchronous, against a live server."""

from __future__ import annotations

import asyncio

import openai
import pytest
from pydantic import BaseModel
from serving import ScriptRunner

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def connect():
    """Clients of both kinds for a server; closed at the end."""

    def make(server):
        return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)

    return make


async def test_async_client(serve, connect):
    server = await serve("Hello")
    async with connect(server) as client:
        answer = await client.chat.completions.create(model="org/fake", messages=MESSAGES)
        assert answer.choices[0].message.content == "Hello"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == 6
        stream = await client.chat.completions.create(
            model="org/fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage.completion_tokens == 6
        text = await client.completions.create(model="org/fake", prompt="Hi", logprobs=1)
        assert text.choices[0].text == "Hello"
        assert text.choices[0].logprobs.text_offset[:3] == [0, 1, 2]
        assert [model.id async for model in client.models.list()] == ["org/fake"]
        assert (await client.models.retrieve("org/fake")).id == "org/fake"


async def test_extensions_through_extra_body(serve, connect):
    server = await serve("Hello")
    async with connect(server) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model="org/fake", messages=MESSAGES, user="me", extra_body={"top_k": 3, "min_p": 0.1}
        )
        assert raw.headers["x-ruvon-ignored"] == "user"
        assert raw.parse().choices[0].message.content == "Hello"


async def test_the_helper_that_accumulates_a_stream(serve, connect):
    server = await serve("Hello")
    async with (
        connect(server) as client,
        client.chat.completions.stream(
            model="org/fake", messages=MESSAGES, logprobs=True, n=2
        ) as stream,
    ):
        final = await stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["Hello", "Hello"]
    assert len(final.choices[0].logprobs.content) == 6


async def test_answers_feed_back_as_messages(serve, connect):
    """A message of an answer, dumped with all its fields, is a message of the next request."""
    server = await serve("Hello")
    async with connect(server) as client:
        first = await client.chat.completions.create(model="org/fake", messages=MESSAGES)
        history = [*MESSAGES, first.choices[0].message.model_dump(), *MESSAGES]
        raw = await client.chat.completions.with_raw_response.create(
            model="org/fake", messages=history
        )
        assert "x-ruvon-ignored" not in raw.headers


class City(BaseModel):
    """Paris, say."""

    name: str
    people: int


CITY = '{"name":"Paris","people":2}'
CALL = f'<tool_call>\n{{"name": "City", "arguments": {CITY}}}\n</tool_call>'
ROOM = {"max_model_len": 2048}


async def test_an_answer_parsed_into_a_class(serve, connect):
    server = await serve(CITY)
    async with connect(server) as client:
        answer = await client.chat.completions.parse(
            model="org/fake", messages=MESSAGES, response_format=City
        )
        assert answer.choices[0].message.parsed == City(name="Paris", people=2)
        async with client.chat.completions.stream(
            model="org/fake", messages=MESSAGES, response_format=City
        ) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.parsed == City(name="Paris", people=2)


async def test_calls_parsed_into_a_class(serve, connect):
    server = await serve(CALL, numbers=ROOM)
    tools = [openai.pydantic_function_tool(City)]
    async with connect(server) as client:
        asked = {"model": "org/fake", "messages": MESSAGES, "tools": tools}
        answer = await client.chat.completions.parse(**asked, tool_choice="required")
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.parsed_arguments == City(name="Paris", people=2)
        assert answer.choices[0].finish_reason == "tool_calls"
        async with client.chat.completions.stream(**asked) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_completion()
        assert kinds.count("tool_calls.function.arguments.done") == 1
        assert final.choices[0].message.tool_calls[0].function.arguments == CITY
        assert final.choices[0].message.content in (None, "")
        result = {"role": "tool", "tool_call_id": call.id, "content": "Yes."}
        raw = await client.chat.completions.with_raw_response.create(
            **asked | {"messages": [*MESSAGES, answer.choices[0].message.model_dump(), result]}
        )
        assert "x-ruvon-ignored" not in raw.headers


async def test_completions_of_a_given_form(serve, connect):
    server = await serve("yes")
    async with connect(server) as client:
        for extra in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_regex": "yes"}):
            answer = await client.completions.create(
                model="org/fake", prompt="Hi", extra_body=extra
            )
            assert answer.choices[0].text == "yes"
        with pytest.raises(openai.BadRequestError) as error:
            await client.completions.create(
                model="org/fake", prompt="Hi", extra_body={"guided_regex": "a", "regex": "a"}
            )
        assert error.value.param == "regex"


async def test_errors_are_the_clients_own_classes(serve, connect):
    server = await serve(numbers={"max_model_len": 64})
    async with connect(server) as client:
        create = client.chat.completions.create
        with pytest.raises(openai.NotFoundError) as unknown:
            await create(model="gpt-4o", messages=MESSAGES)
        assert unknown.value.code == "model_not_found"
        assert unknown.value.request_id
        with pytest.raises(openai.BadRequestError) as bad:
            await create(model="org/fake", messages=MESSAGES, temperature=9)
        assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
        with pytest.raises(openai.BadRequestError) as long:
            await create(model="org/fake", messages=[{"role": "user", "content": "x" * 100}])
        assert long.value.code == "context_length_exceeded"


async def test_an_error_in_mid_stream_is_raised(serve, connect):
    class Fails(ScriptRunner):
        def _draw(self, row, context):
            if len(row.history) > row.num_prompt + 2:
                self.errors[row.seq_id] = "NaN in the logits"
            return super()._draw(row, context)

    server = await serve(runner=Fails("Hello"))
    async with connect(server) as client:
        stream = await client.chat.completions.create(
            model="org/fake", messages=MESSAGES, stream=True
        )
        with pytest.raises(openai.APIError, match="NaN in the logits"):
            async for _ in stream:
                pass


async def test_closing_a_stream_early_frees_it(serve, connect):
    server = await serve(runner=ScriptRunner("x" * 400, seconds=0.001))
    async with connect(server) as client:
        stream = await client.chat.completions.create(
            model="org/fake", messages=MESSAGES, stream=True
        )
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
    await server.until(lambda: server.idle)
    assert len(server.fake.plans) < 300


async def test_sync_client_in_a_thread(serve):
    server = await serve("Hello")

    def work():
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model="org/fake", messages=MESSAGES)
            stream = client.completions.create(model="org/fake", prompt=["a", "b"], stream=True)
            pieces = {0: "", 1: ""}
            for chunk in stream:
                pieces[chunk.choices[0].index] += chunk.choices[0].text
        return whole.choices[0].message.content, pieces

    assert await asyncio.to_thread(work) == ("Hello", {0: "Hello", 1: "Hello"})


async def test_many_clients_at_once(serve, connect):
    server = await serve(lambda prompt: prompt.split("\n")[1] + "!", max_num_seqs=8)
    async with connect(server) as client:

        async def ask(number):
            stream = await client.chat.completions.create(
                model="org/fake",
                messages=[{"role": "user", "content": f"say {number}"}],
                stream=number % 2 == 0,
            )
            if number % 2:
                return stream.choices[0].message.content
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        answers = await asyncio.gather(*(ask(number) for number in range(32)))
    assert answers == [f"say {number}!" for number in range(32)]
    server.assert_idle()
