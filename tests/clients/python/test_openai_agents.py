"""OpenAI's Agents SDK: a loop of tool calls, over each of its model classes."""

from __future__ import annotations

import asyncio

import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)
KINDS = [OpenAIChatCompletionsModel, OpenAIResponsesModel]


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture(params=KINDS, ids=["chat", "responses"])
def run(request, url):
    """``run(agent fields, text, streamed) -> what came of it``."""

    def work(text: str, streamed: bool = False, **fields: object) -> object:
        async def go() -> object:
            async with AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
                model = request.param(model="scripted", openai_client=client)
                agent = Agent(name="Tester", instructions="Obey.", model=model, **fields)
                if not streamed:
                    return await Runner.run(agent, text, max_turns=4)
                result = Runner.run_streamed(agent, text, max_turns=4)
                async for _ in result.stream_events():
                    pass
                return result

        return asyncio.run(go())

    return work


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_tool_loop(run, streamed):
    result = run('call: add {"a":1,"b":2}', streamed, tools=[add])
    assert result.final_output == "It says 3"
    types = [item.type for item in result.new_items if item.type != "reasoning_item"]
    assert types == ["tool_call_item", "tool_call_output_item", "message_output_item"]


def test_two_calls_at_once(run):
    result = run('call: add {"a":1,"b":2}\ncall: add {"a":3,"b":4}', tools=[add])
    outputs = [item.output for item in result.new_items if item.type == "tool_call_output_item"]
    assert outputs == [3, 7]


def test_required_tool(run):
    settings = ModelSettings(tool_choice="required", temperature=0, max_tokens=200)
    assert run('call: add {"a":1,"b":2}', tools=[add], model_settings=settings).final_output


def test_typed_output(run):
    result = run('say: {"name":"Ann","age":30}', output_type=Person)
    assert result.final_output == Person(name="Ann", age=30)
