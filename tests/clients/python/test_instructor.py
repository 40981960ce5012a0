"""instructor: typed answers, by each of its ways."""

from __future__ import annotations

import asyncio

import instructor
import openai
import pytest
from pydantic import BaseModel

ASK = {"model": "scripted", "max_retries": 0}
CALL = 'call: Person {"name":"Ann","age":30}'
SAY = 'say: {"name":"Ann","age":30}'


class Person(BaseModel):
    name: str
    age: int


ANN = {"name": "Ann", "age": 30}
MODES = {
    instructor.Mode.TOOLS: CALL,
    instructor.Mode.TOOLS_STRICT: CALL,
    instructor.Mode.JSON: SAY,
    instructor.Mode.JSON_SCHEMA: SAY,
    instructor.Mode.MD_JSON: "say: ```json\n" + SAY.removeprefix("say: ") + "\n```",
    instructor.Mode.RESPONSES_TOOLS: CALL,
}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_typed_answer(client, mode):
    asked = instructor.from_openai(client, mode=mode)
    answer = asked.chat.completions.create(response_model=Person, messages=user(MODES[mode]), **ASK)
    assert answer.model_dump() == ANN  # it makes a class of its own


def test_partial_answers(client):
    stream = instructor.from_openai(client).chat.completions.create_partial(
        response_model=Person, messages=user(CALL.replace("Person", "PartialPerson")), **ASK
    )
    assert list(stream)[-1].model_dump() == ANN


def test_list_of_answers(client):
    text = 'call: IterablePerson {"tasks":[{"name":"Ann","age":30},{"name":"Bob","age":40}]}'
    people = instructor.from_openai(client).chat.completions.create_iterable(
        response_model=Person, messages=user(text), **ASK
    )
    assert [person.name for person in people] == ["Ann", "Bob"]


def test_async(url):
    async def work() -> dict:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none") as client:
            answer = await instructor.from_openai(client).chat.completions.create(
                response_model=Person, messages=user(CALL), **ASK
            )
            return answer.model_dump()

    assert asyncio.run(work()) == ANN
