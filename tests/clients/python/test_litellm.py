"""LiteLLM: its generic OpenAI provider, and Anthropic's."""

from __future__ import annotations

import asyncio
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch one

import litellm
import pytest

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        },
    },
}
CALL = 'call: add {"a":1,"b":2}'


@pytest.fixture
def server(url):
    return {"model": "openai/scripted", "api_base": url + "/v1", "api_key": "none"}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_chat(server):
    answer = litellm.completion(messages=user("say: Hello there"), **server)
    assert answer.choices[0].message.content == "Hello there"
    assert answer.usage.completion_tokens > 0


def test_stream(server):
    chunks = list(litellm.completion(messages=user("say: one two"), stream=True, **server))
    rebuilt = litellm.stream_chunk_builder(chunks)
    assert rebuilt.choices[0].message.content == "one two"


def test_tool_loop(server):
    first = litellm.completion(messages=user(CALL), tools=[ADD], **server)
    message = first.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3"}
    history = [*user(CALL), message.model_dump(), result]
    second = litellm.completion(messages=history, tools=[ADD], **server)
    assert second.choices[0].message.content == "It says 3"


def test_tools_streamed(server):
    chunks = list(litellm.completion(messages=user(CALL), tools=[ADD], stream=True, **server))
    (call,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("add", '{"a":1,"b":2}')


def test_json(server):
    answer = litellm.completion(
        messages=user('say: {"a":1}'), response_format={"type": "json_object"}, **server
    )
    assert answer.choices[0].message.content == '{"a":1}'


def test_responses(server):
    answer = litellm.responses(input="say: Hello there", **server)
    assert answer.output[0].content[0].text == "Hello there"


def test_messages(url):
    async def work() -> dict:
        return await litellm.anthropic.messages.acreate(
            model="anthropic/scripted", messages=user("say: Hello there"), max_tokens=64,
            api_base=url, api_key="none",
        )  # fmt: skip

    assert asyncio.run(work())["content"][0]["text"] == "Hello there"


def test_text_completion(server):
    options = server | {"model": "text-completion-openai/scripted"}
    assert litellm.text_completion(prompt="say: text", **options).choices[0].text == "text"


def test_embeddings(server):
    answer = litellm.embedding(input=["one", "two"], **server)
    assert len(answer.data) == 2
