"""``python -m ruvon serve`` as users start it, on the embedded model, over a real socket."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Literal
from urllib.request import Request, urlopen

import openai
import pytest
from embedded import MODEL, Process, needs_model, running
from jsonschema import validate
from ports import free_port
from pydantic import BaseModel, Field

QUESTION = [{"role": "user", "content": "Write a short poem about the sea."}]


@contextmanager
def client(process: Process) -> Iterator[openai.OpenAI]:
    url = process.wait_for("listening")["url"]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.mark.slow
@needs_model
def test_the_embedded_model_from_start_to_drain():
    with running("--kv-cache-memory", "256MiB", anew=True) as process, client(process) as ask:
        ready = process.wait_for("ready")
        assert ready["model"] == MODEL

        whole = ask.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=16
        )
        stream = ask.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=16, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == whole.choices[0].message.content
        assert len(pieces) > 5

        text = ask.completions.create(
            model=MODEL, prompt="The capital of France is", max_tokens=1, temperature=0
        )
        assert text.choices[0].text == " Paris"
        text = ask.completions.create(
            model=MODEL, prompt="The capital of France is", max_tokens=0, echo=True, logprobs=1
        )
        logprobs = text.choices[0].logprobs
        assert "".join(logprobs.tokens) == "The capital of France is"
        assert all(value < 0 for value in logprobs.token_logprobs[1:])

        seeded = [
            ask.completions.create(model=MODEL, prompt="Once upon", seed=7, max_tokens=8)
            for _ in range(2)
        ]
        assert seeded[0].choices[0].text == seeded[1].choices[0].text

        last = ask.completions.create(
            model=MODEL, prompt="Once upon", stream=True, max_tokens=64,
            extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
        )  # fmt: skip
        next(iter(last))
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for("draining")
        with pytest.raises(openai.InternalServerError) as refused:
            ask.completions.create(model=MODEL, prompt="Too late")
        assert refused.value.code == "shutting_down"
        chunks = list(last)
        assert chunks[-1].usage.completion_tokens == 64
        process.wait_for("drained")
        assert process.popen.wait(20) == 0
        assert "rror" not in process.rest()


class Weather(BaseModel):
    """The weather of some days."""

    city: Annotated[str, Field(max_length=16)]
    days: Annotated[int, Field(ge=1, le=9)]
    sky: Literal["clear", "cloudy"]


SUM = {
    "type": "custom",
    "custom": {
        "name": "sum",
        "format": {
            "type": "grammar",
            "grammar": {"syntax": "regex", "definition": "[0-9]{1,3}[+-][0-9]{1,3}"},
        },
    },
}


@pytest.mark.slow
@needs_model
def test_the_embedded_model_calls_and_obeys():
    """What must be called is called, and what an answer must be it is, by a model of 135 million
    weights."""
    with running("--kv-cache-memory", "256MiB") as process, client(process) as ask:
        process.wait_for("ready")
        chats = ask.chat.completions
        asked = {"model": MODEL, "messages": QUESTION, "seed": 1, "max_tokens": 80}
        tools = [openai.pydantic_function_tool(Weather), SUM]
        named = {"type": "function", "function": {"name": "Weather"}}

        answer = chats.parse(**asked, tools=tools[:1], tool_choice=named, n=2)
        for choice in answer.choices:
            (call,) = choice.message.tool_calls
            assert isinstance(call.function.parsed_arguments, Weather)
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        with chats.stream(
            **asked, tools=tools[:1], tool_choice="required", parallel_tool_calls=False
        ) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)
        assert "tool_calls.function.arguments.delta" in kinds
        choice = {"type": "custom", "custom": {"name": "sum"}}
        (call,) = (
            chats.create(**asked, tools=tools, tool_choice=choice).choices[0].message.tool_calls
        )
        assert re.fullmatch(r"\d{1,3}[+-]\d{1,3}", call.custom.input)

        parsed = chats.parse(**asked, response_format=Weather, logprobs=True).choices[0]
        assert isinstance(parsed.message.parsed, Weather)
        assert parsed.message.content == parsed.message.parsed.model_dump_json()  # compact
        scored = "".join([entry.token for entry in parsed.logprobs.content])
        assert scored.startswith(parsed.message.content)
        with chats.stream(**asked, response_format=Weather) as stream:
            streamed = stream.get_final_completion().choices[0]
        assert streamed.message.content == parsed.message.content

        texts = ask.completions.create(
            model=MODEL, prompt=["A number:", "Two:"], n=2, temperature=2, seed=3,
            extra_body={"structured_outputs": {"regex": "[1-9][0-9]{3}"}},
        )  # fmt: skip
        assert all(re.fullmatch("[1-9][0-9]{3}", choice.text) for choice in texts.choices)
        assert {choice.finish_reason for choice in texts.choices} == {"stop"}
        broken = {"type": "object", "properties": {"a": {"$ref": "http://x"}}}
        with pytest.raises(openai.BadRequestError, match=r"/properties/a/\$ref") as refused:
            ask.completions.create(model=MODEL, prompt="a", extra_body={"guided_json": broken})
        assert refused.value.param == "guided_json"


@needs_model
def test_a_second_signal_ends_at_once():
    with running("--kv-cache-memory", "64MiB") as process, client(process) as ask:
        process.wait_for("ready")
        stream = ask.completions.create(
            model=MODEL, prompt="Once", stream=True, max_tokens=600, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        process.popen.send_signal(signal.SIGINT)
        process.wait_for("draining")
        while process.popen.poll() is None:  # what comes right after the first counts as the first
            process.popen.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.popen.wait(0.1)
        assert process.popen.returncode == 128 + signal.SIGINT
        with pytest.raises(openai.APIError):
            list(stream)


@needs_model
def test_a_log_that_nobody_reads_costs_nobody_an_answer():
    with running("--kv-cache-memory", "64MiB") as process, client(process) as ask:
        process.wait_for("ready")
        process.go_deaf()
        for stream in (False, True):
            answer = ask.completions.create(model=MODEL, prompt="Once", max_tokens=2, stream=stream)
            assert not stream or list(answer)[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.NotFoundError):
            ask.completions.create(model="none", prompt="Once")
        url = str(ask.base_url).removesuffix("v1/")
        with urlopen(f"{url}metrics") as page:
            lines = page.read().decode().splitlines()
        dropped = [line for line in lines if line.startswith("ruvon_log_lines_dropped_total")]
        assert float(dropped[0].split()[1]) >= 2  # one more met a read that had begun
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(20) == 0


def listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@needs_model
def test_no_stderr_at_all():
    port = free_port()
    command = [sys.executable, "-m", "ruvon", "serve", "--port", str(port)]
    with subprocess.Popen(["sh", "-c", 'exec "$0" "$@" 2>&-', *command]) as process:
        while not listening(port):
            with suppress(subprocess.TimeoutExpired):
                pytest.fail(f"ended with {process.wait(0.1)}")
        process.terminate()
        assert process.wait(60) == 0


def test_a_failed_load_ends_with_its_error_and_code_1(tmp_path):
    with running("--model", str(tmp_path)) as process:
        rest = process.rest()
        assert process.popen.returncode == 1
    assert str(tmp_path) in rest.splitlines()[-1]
    assert "Traceback" not in rest


@needs_model
def test_a_signal_while_loading_ends_cleanly():
    with running("--kv-cache-memory", "64MiB") as process:
        process.wait_for("listening")
        process.popen.send_signal(signal.SIGTERM)
        rest = process.rest()
        assert process.popen.returncode == 0, rest
        assert "Traceback" not in rest


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


def post(url: str, body: dict[str, object]) -> bytes:
    with urlopen(Request(url, json.dumps(body).encode())) as reply:
        return reply.read()


@pytest.mark.slow
@needs_model
def test_messages_force_a_call_and_a_form():
    with running("--kv-cache-memory", "128MiB") as process:
        url = process.wait_for("listening")["url"]
        process.wait_for("ready")
        asked = {"max_tokens": 60, "temperature": 0, "messages": QUESTION}
        tool = {"name": "get_weather", "input_schema": WEATHER}
        once = {"type": "any", "disable_parallel_tool_use": True}
        body = asked | {"tools": [tool], "tool_choice": once}
        answer = json.loads(post(f"{url}/v1/messages", body))
        assert answer["stop_reason"] == "tool_use"
        (call,) = answer["content"]
        validate(call["input"], WEATHER)
        parts = post(f"{url}/v1/messages", body | {"stream": True}).decode().split("\n\n")
        events = [json.loads(part.partition("data: ")[2]) for part in parts if part]
        deltas = [
            event["delta"] for event in events if event.get("index") == 0 and "delta" in event
        ]
        assert json.loads("".join(delta["partial_json"] for delta in deltas)) == call["input"]
        assert events[0]["message"]["usage"]["cache_read_input_tokens"] > 0
        body = {"messages": QUESTION, "format": WEATHER, "stream": False}
        answer = json.loads(post(f"{url}/api/chat", body))
        validate(json.loads(answer["message"]["content"]), WEATHER)
