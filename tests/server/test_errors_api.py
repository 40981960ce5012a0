"""Whatever is wrong with a request is said in OpenAI's words, before the first byte."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import aiohttp
import pytest
from serving import Fails, ScriptRunner

from ruvon.config import ServerConfig
from ruvon.engine.draw import NOTHING_LEFT
from ruvon.engine.matching import EXHAUSTED

USER = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"temperature": "1"}, "temperature", "invalid_type"),
        ({"n": 0}, "n", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"stop_token_ids": [260]}, "stop_token_ids", "invalid_value"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]", "invalid_value"),
        ({"logit_bias": {"9999": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "invalid_value"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "invalid_value"),
        ({"continue_final_message": True}, "continue_final_message", "invalid_value"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"modalities": ["text", "audio"]}, "modalities", "unsupported_parameter"),
        ({"audio": {"voice": "x"}}, "audio", "unsupported_parameter"),
        ({"guided_json": "{"}, "guided_json", "invalid_value"),
        ({"structural_tag": "{}"}, "structural_tag", "unsupported_parameter"),
        ({"web_search_options": {"a": 1}}, "web_search_options", "unsupported_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_chat_fields_are_named(serve, fields, param, code, stream):
    server = await serve()
    body = {"messages": USER, "stream": stream} | fields
    if "stream_options" in fields:
        body["stream"] = False
    if fields.get("prompt_logprobs"):
        body["stream"] = True
    reply = await server.post("/v1/chat/completions", body)
    assert reply.status == 400, reply.body
    assert reply.headers["Content-Type"] == "application/json"
    assert (reply.error["type"], reply.error["param"]) == ("invalid_request_error", param)
    assert reply.error["code"] == code
    assert not server.fake.plans


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [260]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
    ],
)
async def test_bad_completion_fields_are_named(serve, fields, param):
    server = await serve()
    reply = await server.post("/v1/completions", {"prompt": "Hi"} | fields)
    assert reply.status == 400, reply.body
    assert reply.error["param"] == param


async def test_fields_that_ask_for_nothing_pass(serve):
    server = await serve()
    reply = await server.chat(
        tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"],
        functions=None, audio=None, temperature=None, stop=None,
    )  # fmt: skip
    assert reply.status == 200
    assert "X-Ruvon-Ignored" not in reply.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_fields_without_effect_are_reported(serve, stream):
    server = await serve()
    reply = await server.post(
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Hi", "weight": 1}],
            "user": "me",
            "nonsense\r\nX-Evil": 1,
            "stream": stream,
        },
    )
    assert reply.status == 200
    names = reply.headers["X-Ruvon-Ignored"].split(",")
    assert set(names) == {"user", "nonsense%0D%0AX-Evil", "messages[0].weight"}


async def test_strict_refuses_the_unknown_but_not_openais_own(serve):
    server = await serve(server=ServerConfig(port=0, strict=True))
    assert (await server.chat(user="me", metadata={"a": "b"})).status == 200
    reply = await server.chat(nonsense=1)
    assert reply.status == 400
    assert (reply.error["param"], reply.error["code"]) == ("nonsense", "unknown_parameter")


@pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b'{"messages": "\\ud800"}', b"\xff"])
async def test_bad_json(serve, body):
    server = await serve()
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        reply = await server.post(path, body)
        assert reply.status == 400
        assert reply.error["code"] == "invalid_json"


async def test_errors_stay_small_however_large_the_request(serve):
    server = await serve()
    for fields in ({"temperature": "x" * 100_000}, {"stop": ["x"] * 10_000}, {"x" * 9000: 1}):
        reply = await server.chat(**fields)
        assert len(reply.body) < 1000
        assert len(reply.headers.get("X-Ruvon-Ignored", "")) < 5000


async def test_an_unknown_model(serve):
    server = await serve()
    reply = await server.chat(model="gpt-4o")
    assert reply.status == 404
    assert reply.error == {
        "message": "The model 'gpt-4o' does not exist.",
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }


async def test_a_prompt_that_does_not_fit(serve):
    server = await serve(numbers={"max_model_len": 64})
    reply = await server.chat("x" * 20, max_tokens=30)
    assert reply.status == 400
    assert reply.error == {
        "message": "This model's maximum context length is 64 tokens. However, you requested 69 "
        "tokens (39 in the messages, 30 in the completion). Please reduce the length of the "
        "messages or completion.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
    for reply in (await server.chat("x" * 100), await server.complete("x" * 64)):
        assert reply.error["code"] == "context_length_exceeded"
    assert (await server.chat("x" * 20)).status == 200  # as much as fits


async def test_a_body_that_is_too_large(serve):
    server = await serve(server=ServerConfig(port=0, max_body_size="1KiB"))
    reply = await server.chat("x" * 2000)
    assert reply.status == 413
    assert reply.error["code"] == "request_too_large"
    assert (await server.chat("x" * 20)).status == 200


async def test_unknown_urls_and_methods(serve):
    server = await serve()
    reply = await server.get("/v1/nothing")
    assert (reply.status, reply.error["code"]) == (404, "unknown_url")
    reply = await server.get("/v1/chat/completions")
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
    assert reply.headers["Allow"] == "POST"


async def test_a_full_queue_says_when_to_come_back(serve):
    runner = ScriptRunner("Hello", by_hand=True)
    server = await serve(runner=runner, max_num_seqs=1, max_num_queued_reqs=1)
    waiting = [asyncio.create_task(server.chat()) for _ in range(2)]
    await server.until(lambda: server.num_live == 2)
    for stream in (False, True):
        reply = await server.chat(stream=stream)
        assert reply.status == 503
        assert (reply.error["type"], reply.error["code"]) == ("overloaded", "queue_full")
        assert reply.headers["Retry-After"] == "1"
        assert reply.headers["Retry-After-Ms"] == "1000"
    text = (await server.get("/metrics")).body.decode()
    rejected = 'vllm:admission_rejections_total{model_name="org/fake",reason="max_num_queued_reqs"}'
    assert f"{rejected} 2.0" in text
    await server.finish(*waiting)
    assert [task.result().status for task in waiting] == [200, 200]


async def test_more_at_once_than_can_ever_be_queued(serve):
    server = await serve(max_num_seqs=1, max_num_queued_reqs=1)
    assert (await server.chat(n=3)).status == 400


async def test_request_ids_come_back(serve):
    server = await serve()
    reply = await server.chat()
    assert len(reply.headers["X-Request-Id"]) == 32
    reply = await server.chat(stream=True)
    assert len(reply.headers["X-Request-Id"]) == 32
    headers = {"X-Request-Id": "mine-1"}
    for path, body in (("/v1/chat/completions", b"{"), ("/none", b"")):
        reply = await server.post(path, body, headers=headers)
        assert reply.headers["X-Request-Id"] == "mine-1"
    long = await server.get("/health", headers={"X-Request-Id": "x" * 500})
    assert len(long.headers["X-Request-Id"]) == 32


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failing_first_step_has_a_status(serve, stream):
    server = await serve()
    server.fake.errors[0] = "NaN in the logits"
    reply = await server.chat(stream=stream)
    assert reply.status == 500
    assert reply.error["message"] == "NaN in the logits"
    assert reply.error["code"] == "generation_failed"
    assert reply.headers["X-Should-Retry"] == "false"
    assert (await server.chat(stream=stream)).status == 200  # the next one is fine
    server.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "code"), [(NOTHING_LEFT, "no_token_left"), (EXHAUSTED, "grammar_too_costly")]
)
async def test_what_a_request_s_own_bounds_make_impossible_is_its_fault(serve, stream, error, code):
    server = await serve()
    server.fake.errors[0] = error
    reply = await server.chat(stream=stream)
    assert (reply.status, reply.error["code"]) == (400, code)
    assert reply.error["message"].lower() == f"{error}."
    server.assert_idle()


async def test_an_error_in_mid_stream_is_an_event_then_done(serve):
    server = await serve(runner=Fails("Hello"))
    reply = await server.chat(stream=True)
    assert reply.status == 200
    assert reply.events[-1] == {
        "error": {
            "message": "NaN in the logits",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        }
    }
    assert (await server.chat()).status == 500
    server.assert_idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failed_step_is_an_error_of_its_requests_alone(serve, stream):
    server = await serve()
    server.fake.failing = {1: "run"}
    reply = await server.chat(stream=stream)
    assert (reply.status, reply.error["code"]) == (500, "generation_failed")
    assert (await server.chat(stream=stream)).status == 200
    assert (await server.get("/ready")).status == 200
    server.assert_idle()


async def test_an_error_in_mid_stream_is_told_before_it_is_logged(serve, monkeypatch):
    def unwritable(*args, **fields):
        raise OSError("nobody reads the log")

    monkeypatch.setattr("ruvon.server.events.log", SimpleNamespace(warning=unwritable))
    server = await serve(runner=Fails("Hello"))
    reply = await server.chat(stream=True)
    assert reply.events[-1]["error"]["code"] == "generation_failed"


async def test_a_dead_engine_fails_everything_loudly(serve):
    server = await serve()
    server.fake.broken, server.fake.lost = RuntimeError("secret path /home/me"), True
    for stream in (False, True):
        reply = await server.chat(stream=stream)
        assert reply.status == 500
        assert reply.error["code"] == "engine_dead"
        assert "secret" not in reply.error["message"]
    assert (await server.get("/health")).status == 503
    assert (await server.get("/live")).status == 503
    ready = await server.get("/ready")
    assert (ready.status, ready.json["status"]) == (503, "dead")


async def test_our_own_mistakes_are_not_told_to_clients(serve, monkeypatch):
    server = await serve()
    monkeypatch.setattr(
        type(server.service.tokenizer), "encode", lambda *a, **k: 1 / 0, raising=True
    )
    reply = await server.complete("Hi")
    assert reply.status == 500
    assert reply.error["message"] == "Internal error."


async def test_a_compressed_body_is_refused(serve):
    server = await serve()
    headers = {"Content-Encoding": "gzip"}
    try:
        reply = await server.post("/v1/completions", b"not gzip", headers=headers)
    except aiohttp.ClientError:
        pytest.fail("the connection broke instead of an answer")
    assert (reply.status, reply.error["code"]) == (415, "unsupported_encoding")


@pytest.mark.parametrize("depth", [200, 1010])
@pytest.mark.parametrize("strict", [b"false", b"true"])
async def test_a_tool_nested_without_end_is_refused(serve, depth, strict):
    server = await serve()
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    body = b'{"messages":[{"role":"user","content":"x"}],"tools":[{"type":"function","function":'
    body += b'{"name":"f","strict":%s,"parameters":%s}}]}' % (strict, deep)
    reply = await server.post("/v1/chat/completions", body)
    assert reply.status == 400
    assert reply.error["param"].startswith("tools")
