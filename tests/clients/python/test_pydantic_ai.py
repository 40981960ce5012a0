"""Pydantic AI: an agent with tools and typed output, over chat, responses and messages."""

from __future__ import annotations

import asyncio

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    name: str
    age: int


ANN = Person(name="Ann", age=30)


@pytest.fixture(params=["chat", "responses", "messages"])
def model(request, url):
    if request.param == "messages":
        provider = AnthropicProvider(base_url=url, api_key="none")
        return AnthropicModel("scripted", provider=provider)
    kind = OpenAIChatModel if request.param == "chat" else OpenAIResponsesModel
    return kind("scripted", provider=OpenAIProvider(base_url=url + "/v1", api_key="none"))


def with_add(model: object) -> Agent:
    agent = Agent(model, instructions="Obey.")

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    return agent


def test_tool_loop(model):
    result = asyncio.run(with_add(model).run('call: add {"a":1,"b":2}'))
    assert result.output == "It says 3"
    assert result.usage.tool_calls == 1


def test_tool_loop_streamed(model):
    async def work() -> str:
        async with with_add(model).run_stream('call: add {"a":1,"b":2}') as result:
            return [text async for text in result.stream_text()][-1]

    assert asyncio.run(work()) == "It says 3"


def test_output_by_tool(model):
    text = 'call: final_result {"name":"Ann","age":30}'
    assert asyncio.run(Agent(model, output_type=Person).run(text)).output == ANN


def test_output_by_prompt(model):
    agent = Agent(model, output_type=PromptedOutput(Person))
    assert asyncio.run(agent.run('say: {"name":"Ann","age":30}')).output == ANN


def test_output_by_schema(model):
    if isinstance(model, AnthropicModel):
        pytest.skip("Pydantic AI offers it for Claude's own names only")
    agent = Agent(model, output_type=NativeOutput(Person))
    assert asyncio.run(agent.run('say: {"name":"Ann","age":30}')).output == ANN
