"""The Responses API with the embedded model, whose answers have the form that they must have."""

from __future__ import annotations

import json

import pytest
from embedded import MODEL, needs_model, running
from pydantic import BaseModel
from test_real import client


class Person(BaseModel):
    name: str
    age: int


ADD = {
    "type": "function",
    "name": "add",
    "description": "Add two numbers.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
CODE = {
    "type": "custom",
    "name": "code",
    "format": {"type": "grammar", "syntax": "regex", "definition": "[A-Z]{3}-[0-9]{4}"},
}


@pytest.mark.slow
@needs_model
def test_the_embedded_model_answers_as_it_must():
    with running("--kv-cache-memory", "256MiB") as process, client(process) as ask:
        process.wait_for("ready")
        parsed = ask.responses.parse(
            model=MODEL, input="Ann is 31 years old.", text_format=Person, max_output_tokens=60
        )
        assert isinstance(parsed.output_parsed, Person)

        with ask.responses.stream(
            model=MODEL, input="What is 17 plus 4?", tools=[ADD], tool_choice="required",
            parallel_tool_calls=False, max_output_tokens=80,
        ) as stream:  # fmt: skip
            final = stream.get_final_response()
        (call,) = final.output
        assert (call.type, call.name) == ("function_call", "add")
        assert {type(value) for value in json.loads(call.arguments).values()} == {int}

        result = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
        text = ask.responses.create(
            model=MODEL, input=[result], previous_response_id=final.id, max_output_tokens=16
        )
        assert text.output_text
        assert text.usage.input_tokens_details.cached_tokens > 0

        named = ask.responses.create(
            model=MODEL, input="Make a code.", tools=[ADD, CODE], max_output_tokens=60,
            tool_choice={"type": "custom", "name": "code"},
        )  # fmt: skip
        (call,) = named.output
        assert call.type == "custom_tool_call"
        letters, digits = call.input.split("-")
        assert (len(letters), len(digits)) == (3, 4)

        listed = ask.responses.create(
            model=MODEL, input="List three colors as JSON.", max_output_tokens=64,
            text={"format": {"type": "json_object"}},
        )  # fmt: skip
        if listed.status == "completed":
            assert isinstance(json.loads(listed.output_text), dict)
