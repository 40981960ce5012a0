"""One test for each class of fault that servers of this kind had in 2026, with an example of it.

What holds a class elsewhere is named there: damaged model files (`tests/models/test_damaged.py`),
endless templates (`tests/models/test_template_cost.py`), clients that hold connections
(`test_connections.py`), keys (`test_keys.py`).
"""

from __future__ import annotations

import ast
import asyncio
import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp.http_parser import DeflateBuffer
from serving import VOCAB_SIZE, ScriptRunner, open_server

import ruvon
from ruvon.config import ServerConfig
from ruvon.server.app import ROUTES

PACKAGE = Path(ruvon.__file__).parent
SUSPECT = re.compile(r"pickle|dill|marshal|shelve|joblib|\b(eval|exec|load|__import__)\(|trust_")
CODE = ("pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
FORBIDDEN = {f"import {name}" for name in CODE} | {
    "eval()", "exec()", "__import__()", "torch.load()", "trust_remote_code=True",
    "trust_remote_code=something",
}  # fmt: skip
NEVER = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
HELLO = [{"role": "user", "content": "Hi"}]
BOMB = gzip.compress(b'{"prompt": "' + bytes(1 << 20))
ENCODINGS = ("gzip", "deflate", "br", "zstd", "gzip, gzip")


def names_of(node: ast.AST) -> Iterator[str]:
    """What a node imports, calls, or names as an argument."""
    match node:
        case ast.Import(names=aliases):
            yield from (f"import {alias.name.partition('.')[0]}" for alias in aliases)
        case ast.ImportFrom(module=str(module)):
            yield f"import {module.partition('.')[0]}"
        case ast.Call(func=ast.Name(id=name)):
            yield f"{name}()"
        case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)):
            yield f"{owner}.{name}()"
        case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=value)):
            yield f"trust_remote_code={value}"
        case ast.keyword(arg="trust_remote_code"):
            yield "trust_remote_code=something"


def test_no_code_but_our_own_is_run():
    """SGLang CVE-2026-3059, 3060, 3989, 15969, 7304 (pickles from a socket or a file), 15976
    (eval); vLLM CVE-2025-30165, CVE-2026-27893 (trust_remote_code written into a call). Nothing
    here reads what can hold code."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if SUSPECT.search(source := path.read_text(encoding="utf-8")):
            found = {name for node in ast.walk(ast.parse(source)) for name in names_of(node)}
            assert not found & FORBIDDEN, path


async def test_template_injection(serve):
    """SGLang CVE-2026-5760: a template that came with the request ran as code. Text of a request
    is never a template, and a request cannot bring one."""
    server = await serve(lambda prompt: prompt.split("user\n")[1].split("\nassistant")[0])
    source = "{{ 7 * 7 }}{{ ''.__class__.__mro__ }}{% include '/etc/passwd' %}"
    reply = await server.chat(source, max_tokens=200)
    assert reply.json["choices"][0]["message"]["content"].strip() == source
    for where in ({"chat_template": source}, {"template": source}):
        reply = await server.chat("Hi", **where)
        assert reply.status == 400
        assert reply.error["param"] in where


async def test_template_without_end(serve, tmp_path, monkeypatch):
    """vLLM CVE-2026-115911, PYSEC-2026-4349: rendering without a bound on time. Here it ends, and
    while it goes on others are answered."""
    monkeypatch.setattr("ruvon.models.template_cost.MOST_SECONDS", 0.3)
    path = tmp_path / "endless.jinja"
    path.write_text(NEVER)
    server = await serve("Hello", server=ServerConfig(port=0, chat_template=str(path)))
    asked = asyncio.create_task(server.chat())
    answered = 0
    while not asked.done():
        assert (await server.complete(max_tokens=1)).status == 200
        answered += 1
    assert asked.result().status == 400
    assert "it took more than" in asked.result().error["message"]
    assert answered > 1


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_data": "AAAA"}},
        {"type": "video_url", "video_url": {"url": "http://localhost:22\\@example.com/"}},
    ],
)
async def test_fetching_and_media(serve, part):
    """vLLM CVE-2026-24779 (two readings of one URL), 22778, 116175: nothing is fetched and nothing
    is decoded."""
    server = await serve("Hello")
    messages = [{"role": "user", "content": [{"type": "text", "text": "Look"}, part]}]
    reply = await server.post("/v1/chat/completions", {"messages": messages})
    assert reply.status == 400
    assert reply.error["param"].startswith("messages[0].content")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"allowed_token_ids": [2**62]}, "allowed_token_ids"),
        ({"logprobs": 1, "logprob_token_ids": [VOCAB_SIZE]}, "logprob_token_ids"),
        ({"prompt": [1, VOCAB_SIZE]}, "prompt"),
        ({"prompt": [2**63]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
    ],
)
async def test_ids_out_of_range(serve, fields, param):
    """vLLM CVE-2026-93989: ids of bad_words beyond the vocabulary wrote into others' rows."""
    server = await serve("Hello")
    reply = await server.post("/v1/completions", {"prompt": "Hi", **fields})
    assert reply.status == 400
    assert reply.error["param"].startswith(param)
    server.assert_idle()


async def test_one_request_by_anothers_id(serve):
    """SGLang CVE-2026-112266: who named a request like another's could end it."""
    runner = ScriptRunner("Hello")
    server = await open_server(runner=runner)
    named = {"X-Request-Id": "mine"}
    first = asyncio.create_task(
        server.post("/v1/completions", {"prompt": "a", "request_id": "mine"}, headers=named)
    )
    second = asyncio.create_task(
        server.post("/v1/completions", {"prompt": "b", "request_id": "mine"}, headers=named)
    )
    second.cancel()
    await asyncio.wait([second])
    assert (await first).json["choices"][0]["text"] == "Hello"
    await server.stack.aclose()


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": s}}}
        for s in (
            {"type": "string", "pattern": "((((a{99}){99}){99}){99})"},
            {"$ref": "#"},
            {"$ref": "http://127.0.0.1:1/schema"},
            {"type": "array", "minItems": 2**31},
            {"anyOf": [{}] * 5000},
            {"type": 7},
        )
    ]
    + [{"regex": "(a*)*" * 999}, {"grammar": "start: start start | start"}],
)
async def test_one_constraint_ends_nothing(serve, fields):
    """vLLM CVE-2026-105757, PYSEC-2026-145, 2303, 2304, 4353: a schema or an expression that killed
    the engine, or kept it busy. Each is served or refused by name, and the next request is
    answered."""
    server = await serve("Hello")
    reply = await server.chat("Hi", max_tokens=3, **fields)
    assert reply.status in (200, 400, 503)
    assert (await server.chat("Hi")).status == 200
    server.assert_idle()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"n": 129}, "n"),
        ({"logprobs": True, "top_logprobs": 10**6}, "top_logprobs"),
        ({"prompt_logprobs": 10**6}, "prompt_logprobs"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"bad_words": ["x"] * 257}, "bad_words"),
        ({"logprobs": True, "logprob_token_ids": [1] * 129}, "logprob_token_ids"),
        ({"allowed_token_ids": [1] * (VOCAB_SIZE + 1)}, "allowed_token_ids"),
        ({"max_tokens": 10**12}, "messages"),
        ({"thinking_token_budget": -(10**12)}, "thinking_token_budget"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}] * 1025}, "tools"),
        ({"messages": HELLO * 4097}, "messages"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
    ],
)
async def test_resource_exhaustion(serve, fields, param):
    """vLLM CVE-2026-34756 (n), 92365 (thinking budget), PYSEC-2026-4350 (logprob_token_ids): fields
    without a bound. All have one, and the error names the field."""
    server = await serve("Hello")
    reply = await server.post("/v1/chat/completions", {"messages": HELLO, **fields})
    assert reply.status == 400
    assert reply.error["param"].startswith(param)
    assert len(reply.body) < 1000
    server.assert_idle()


@pytest.mark.parametrize("depth", [200, 900, 1100, 100_000])
@pytest.mark.parametrize("where", ["documents", "chat_template_kwargs", "tools", "messages"])
async def test_depth(serve, depth, where):
    """llama.cpp CVE-2026-107183 and its like: JSON deeper than a parser's stack."""
    server = await serve("Hello")
    inner = b'{"a":' * depth + b"1" + b"}" * depth
    value = {
        "documents": b"[%s]" % inner,
        "chat_template_kwargs": inner,
        "tools": b'[{"type":"function","function":{"name":"f","parameters":%s}}]' % inner,
        "messages": b'[{"role":"user","content":[%s]}]' % inner,
    }[where]
    body = b'{"max_tokens":1,"messages":[{"role":"user","content":"Hi"}],"%s":%s}'
    reply = await server.post("/v1/chat/completions", body % (where.encode(), value))
    assert reply.status in (200, 400)
    assert len(reply.body) < 2000
    assert (await server.chat()).status == 200


async def test_decompression(serve, monkeypatch):
    """aiohttp CVE-2025-69223 and its like: a small body that becomes a huge one. None is
    decompressed, of no route, before it is refused."""
    monkeypatch.setattr(DeflateBuffer, "__init__", lambda *given: pytest.fail("decompressed"))
    server = await serve("Hello")
    takes_bodies = [route for route in ROUTES if route.kwargs.get("expect_handler")]
    assert len(takes_bodies) > 15
    for number, route in enumerate(takes_bodies):
        encoding = ENCODINGS[number % len(ENCODINGS)]
        reply = await server.post(route.path, BOMB, headers={"Content-Encoding": encoding})
        if not route.path.startswith("/debug/"):  # which are refused here whatever comes
            assert reply.status == 415, route.path
            assert f"Content-Encoding '{encoding}' is not supported.".encode() in reply.body


@pytest.mark.parametrize(
    "path",
    ["/v1/models/../../etc/passwd", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/%2e%2e/x",
     "/v1/responses/..%2f..%2fx", "//etc/passwd", "/v1/models/" + "a" * 7000],
)  # fmt: skip
async def test_path_traversal(serve, path):
    """SGLang CVE-2026-7302. Names are looked up in tables; nothing of a request names a file."""
    server = await serve("Hello")
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    told = await reader.read()
    writer.close()
    assert b" 404 " in told.partition(b"\r\n")[0]
    assert b"root:" not in told
    assert len(told) < 1200


async def test_errors_tell_nothing_of_the_inside(serve, monkeypatch):
    """A path, a trace or a name of the code in an answer helps whoever attacks."""
    server = await serve("Hello")

    def broken(*args: object) -> None:
        raise RuntimeError(f"secret at {PACKAGE}")

    monkeypatch.setattr(type(server.service), "prepare", broken)
    reply = await server.chat()
    assert reply.status == 500
    assert reply.error["message"] == "Internal error."
    assert b"secret" not in reply.body
    assert b"ruvon/" not in reply.body
