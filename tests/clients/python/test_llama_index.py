"""LlamaIndex: its class for servers that are like OpenAI's."""

from __future__ import annotations

import asyncio

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture
def llm(url):
    return OpenAILike(
        model="scripted", api_base=url + "/v1", api_key="none", is_chat_model=True,
        is_function_calling_model=True, context_window=8192, max_retries=0,
    )  # fmt: skip


def test_chat(llm):
    answer = llm.chat([ChatMessage(role="user", content="say: Hello there")])
    assert answer.message.content == "Hello there"


def test_stream(llm):
    pieces = list(llm.stream_chat([ChatMessage(role="user", content="say: one two")]))
    assert pieces[-1].message.content == "one two"


def test_completion(url):
    llm = OpenAILike(model="scripted", api_base=url + "/v1", api_key="none", max_retries=0)
    assert llm.complete("say: text").text == "text"
    assert list(llm.stream_complete("say: text"))[-1].text == "text"


def test_tool(llm):
    tool = FunctionTool.from_defaults(add)
    answer = llm.predict_and_call([tool], user_msg='call: add {"a":1,"b":2}')
    assert answer.response == "3"


def test_structured(llm):
    prompt = 'call: Person {"name":"Ann","age":30}'
    answer = llm.as_structured_llm(Person).complete(prompt)
    assert answer.raw == Person(name="Ann", age=30)


def test_agent(llm):
    async def work() -> str:
        return str(await FunctionAgent(tools=[add], llm=llm).run('call: add {"a":1,"b":2}'))

    assert asyncio.run(work()) == "It says 3"
