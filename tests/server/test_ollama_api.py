"""Ollama's API, as its clients see it."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from serving import Fails, Reply, Server

from ruvon.config import ServerConfig
from ruvon.deltas import Delta, ToolCall
from ruvon.engine.types import Job
from ruvon.server.writers.ollama import OllamaWriter
from ruvon.telemetry.finished import Finished

USER = {"role": "user", "content": "Hi"}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "f", "arguments": {"é": 1}}}],
}
TIMES = {"created_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration"}


async def chat(server: Server, *messages: object, **fields: Any) -> Reply:
    body = {"model": "org/fake", "messages": list(messages or [USER]), "stream": False}
    return await server.post("/api/chat", body | fields)


def lines(reply: Reply) -> list[Any]:
    assert reply.headers["Content-Type"] == "application/x-ndjson"
    return [orjson.loads(line) for line in reply.body.splitlines()]


def timeless(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from one run to the next, which must be there."""
    assert answer.keys() >= TIMES
    assert all(type(answer[key]) is int and answer[key] >= 0 for key in TIMES - {"created_at"})
    return {key: value for key, value in answer.items() if key not in TIMES}


async def test_a_whole_answer_and_a_stream(serve):
    server = await serve("Hé")
    whole = (await chat(server, model="org/fake:latest")).json
    assert timeless(whole) == {
        "model": "org/fake:latest",
        "message": {"role": "assistant", "content": "Hé"},
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": 21,
        "eval_count": 4,
    }
    *pieces, last = lines(await server.post("/api/chat", {"messages": [USER]}))  # streams
    assert [piece["message"]["content"] for piece in pieces] == ["H", "é"]
    assert not any(piece["done"] for piece in pieces)
    assert timeless(last)["message"] == {"role": "assistant", "content": ""}
    assert last["done"]
    assert last["eval_count"] == 4
    headers = {"X-Ruvon-Resume": "true"}  # is for events
    assert lines(await server.post("/api/chat", {"messages": [USER]}, headers=headers))[-1]["done"]


async def test_generate_answers_a_prompt_or_continues_a_raw_one(serve):
    seen: list[str] = []
    server = await serve(lambda prompt: seen.append(prompt) or "ok")
    body = {"model": "org/fake", "prompt": "Hi", "system": "Be brief.", "stream": False}
    whole = (await server.post("/api/generate", body)).json
    assert timeless(whole)["response"] == "ok"
    assert "message" not in whole
    assert seen[-1] == "system\nBe brief.\nuser\nHi\nassistant\n"
    raw = await server.post("/api/generate", {"prompt": "Hi", "raw": True})
    assert "".join(line["response"] for line in lines(raw)) == "ok"
    several = {"prompt": "Hi", "raw": True, "n": 2, "options": {"best_of": 2}}
    reply = await server.post("/api/generate", several)
    assert "".join(line["response"] for line in lines(reply)) == "ok"
    assert set(reply.headers["X-Ruvon-Ignored"].split(",")) == {"n", "options.best_of"}
    assert seen[-1] == "Hi"


async def test_options(serve):
    server = await serve("Hello World")
    stopped = (await chat(server, options={"stop": ["lo W"], "num_predict": -1})).json
    assert (stopped["message"]["content"], stopped["done_reason"]) == ("Hel", "stop")
    options = {
        "num_predict": 3, "temperature": 0.5, "top_k": 5, "top_p": 0.5, "min_p": 0.1,
        "typical_p": 0.9, "seed": 1, "repeat_penalty": 1.1, "presence_penalty": 0.1,
        "frequency_penalty": 0.1, "num_ctx": 512, "mirostat": 0, "tfs_z": 1.0,
        "logit_bias": {"97": 1}, "bad_words": ["x"],
    }  # fmt: skip
    reply = await chat(server, options=options | {"num_thread": 2}, keep_alive="5m", n=2)
    assert (reply.json["message"]["content"], reply.json["done_reason"]) == ("Hel", "length")
    assert set(reply.headers["X-Ruvon-Ignored"].split(",")) == {
        "options.num_thread",
        "n",
        "keep_alive",
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"options": {"num_ctx": 513}}, "num_ctx"),
        ({"options": {"mirostat": 1}}, "mirostat"),
        ({"options": {"repeat_last_n": 64}}, "repeat_last_n"),
        ({"options": {"repeat_last_n": -1}}, None),
        ({"options": {"temperature": "hot"}}, "temperature"),
        ({"options": []}, "options"),
        ({"think": 3}, "think"),
        ({"prompt": ["a", "b"], "raw": True}, "prompt"),
        ({"options": [1]}, "options"),
        ({"options": {"num_ctx": "512"}}, "num_ctx"),
        ({"stream": "no"}, "stream"),
        ({"raw": 1}, "raw"),
        ({"format": "yaml"}, "format"),
        ({"format": {"type": "tuple"}}, "type"),
        ({"best_of": 2}, "best_of"),
        ({"format": "", "options": None, "think": None, "stream": False}, None),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"context": [1, 2]}, "context"),
        ({"messages": [USER | {"images": ["aGk="]}]}, "images"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "tool_calls[0]"),
    ],
)
async def test_what_is_wrong_is_named_in_a_sentence(serve, fields, words):
    server = await serve("ok")
    reply = await chat(server, **fields)
    assert reply.status == (400 if words else 200)
    if words:
        assert list(reply.json) == ["error"]
        assert words in reply.json["error"]


async def test_what_is_not_read_is_named(serve):
    server = await serve("ok")
    told = await chat(server, system="Be brief.", raw=True, prompt="")
    assert told.headers["X-Ruvon-Ignored"] == "system,raw"
    body = {"prompt": "Hi", "messages": [USER], "stream": False}
    told = await server.post("/api/generate", body)
    assert told.headers["X-Ruvon-Ignored"] == "messages"
    told = await server.post("/api/generate", body | {"raw": True, "system": "x", "think": True})
    assert told.headers["X-Ruvon-Ignored"] == "messages,system,think"
    told = await chat(server, think="high")
    assert told.headers["X-Ruvon-Ignored"] == "think"
    strict = await serve("ok", server=ServerConfig(port=0, strict=True))
    assert (await chat(strict, system="Be brief.")).status == 400


async def test_an_unknown_model_is_not_found(serve):
    server = await serve("ok")
    for path in ("/api/chat", "/api/show", "/api/generate"):
        reply = await server.post(path, {"model": "none", "messages": [USER], "prompt": "Hi"})
        assert (reply.status, list(reply.json)) == (404, ["error"])


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_who_asks_nothing_loads_the_model(serve, path):
    server = await serve("ok")
    reply = await server.post(path, {"model": "org/fake", "keep_alive": 0})
    assert (reply.json["done"], reply.json["done_reason"]) == (True, "load")
    server.assert_idle()


async def test_a_conversation_with_tools_is_rendered(serve):
    seen: list[str] = []
    server = await serve(
        lambda prompt: seen.append(prompt) or "ok", numbers={"max_model_len": 2048}
    )
    result = {"role": "tool", "tool_name": "f", "content": "done"}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    reply = await chat(server, USER, CALLED, result, tools=tools)
    assert reply.status == 200, reply.body
    assert "done" in seen[-1]


async def test_an_error_in_mid_stream_is_a_line(serve):
    server = await serve(runner=Fails("Hello"))
    reply = await server.post("/api/chat", {"messages": [USER]})
    assert lines(reply)[-1] == {"error": "NaN in the logits"}


async def test_models(serve):
    server = await serve(server=ServerConfig(port=0, served_model_name="m, n"))
    first, second = (await server.get("/api/tags")).json["models"]
    assert (first["name"], second["model"]) == ("m", "n")
    assert (first["details"]["family"], first["details"]["format"]) == ("Fake", "gguf")
    reply = await server.post("/api/show", {"model": "n:latest", "verbose": True})
    assert reply.headers["X-Ruvon-Ignored"] == "verbose"
    shown = reply.json
    older = (await server.post("/api/show", {"name": "n"})).json
    assert older["digest"] == shown["digest"] == second["digest"] != first["digest"]
    assert shown["model_info"]["Fake.context_length"] == 512
    assert set(shown["capabilities"]) == {"completion", "tools"}
    assert (await server.get("/api/version")).json["version"] >= "0.12"


# ---------------------------------------------------------------------- the writer alone


def writer() -> OllamaWriter:
    return OllamaWriter("r1", "m", [Job((1,))], is_chat=True)


def test_calls_come_whole():
    deltas = [
        Delta(reasoning="hm"),
        Delta(text="So"),
        Delta(tool_call=ToolCall(0, "call_a", "f", '{"x"')),
        Delta(tool_call=ToolCall(0, arguments=": 1}")),
        Delta(tool_call=ToolCall(1, "call_b", "g", "{}")),
        Delta(finish="stop"),
    ]
    calls = [
        {"id": "call_a", "function": {"name": "f", "arguments": {"x": 1}}},
        {"id": "call_b", "function": {"name": "g", "arguments": {}}},
    ]
    whole = writer()
    for delta in deltas:
        whole.feed(delta)
    said = {"role": "assistant", "content": "So", "thinking": "hm", "tool_calls": calls}
    assert whole.result()["message"] == said
    stream = writer()
    pieces = [
        orjson.loads(line)["message"]
        for delta in deltas
        for line in stream.events(delta).splitlines()
    ]
    assert [call for piece in pieces for call in piece.get("tool_calls", [])] == calls
    assert "".join(piece["content"] for piece in pieces) == "So"
    assert "".join(piece.get("thinking", "") for piece in pieces) == "hm"


def test_a_custom_tool_s_input_is_an_argument():
    whole = writer()
    whole.feed(Delta(tool_call=ToolCall(0, "call_a", "sql", "SELECT 1", custom=True)))
    whole.feed(Delta(finish="stop"))
    function = {"name": "sql", "arguments": {"input": "SELECT 1"}}
    assert whole.result()["message"]["tool_calls"] == [{"id": "call_a", "function": function}]


def test_how_long_it_took():
    whole = writer()
    whole.tally.finished = [
        Finished("length", 9, 2, 0, 2, 1, 0.0, queue=1.0, prefill=2.0, decode=4.0)
    ]
    whole.feed(Delta(finish="length"))
    times = {name: value / 1e9 for name, value in whole.result().items() if "duration" in name}
    assert times == {
        "total_duration": 7.0,
        "load_duration": 0.0,
        "prompt_eval_duration": 3.0,
        "eval_duration": 4.0,
    }
