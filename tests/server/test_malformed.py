"""What is no proper HTTP gets OpenAI's error all the same, and hurts nobody else."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import orjson
import pytest
from serving import Reply, Server

from ruvon.config import ServerConfig
from ruvon.server import receive as reading
from ruvon.server.connection import Connection

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
GOOD = b'{"prompt":"Hi"}'


async def send(server: Server, *pieces: bytes, method: str = "POST") -> list[Reply]:
    """Write these bytes to a new connection; the responses, until it is closed or rests."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    replies = []
    while line := await reader.readline():
        headers = {}
        while (header := await reader.readline()).strip():
            name, _, value = header.decode().partition(":")
            headers[name] = value.strip()
        size = int(headers.get("Content-Length", 0)) if method != "HEAD" else 0
        replies.append(Reply(int(line.split()[1]), headers, await reader.readexactly(size)))
        if headers.get("Connection") != "close" and replies[-1].status >= 200:
            break
    writer.close()
    return replies


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX-Null: \x00\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"X-Many: x\r\n" * 20_000 + b"\r\n",
        HEAD + b"Content-Length: many\r\n\r\n" + GOOD,
        HEAD + b"Content-Length: -5\r\n\r\n" + GOOD,
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + GOOD,
        HEAD + b"Content-Length: 15\r\nTransfer-Encoding: chunked\r\n\r\n" + GOOD,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nnot hex\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\ntoo long\r\n0\r\n\r\n",
    ],
)
async def test_malformed_requests(serve, sent, capsys):
    server = await serve()
    replies = await send(server, sent)
    assert [reply.status for reply in replies] == [400]
    assert replies[0].headers["Content-Type"].startswith("application/json")
    assert replies[0].error["type"] == "invalid_request_error"
    assert not replies[0].error["message"].endswith("..")
    assert len(replies[0].body) < 500
    assert (await server.complete()).status == 200
    server.assert_idle()
    assert "Traceback" not in "".join(capsys.readouterr())


async def test_a_body_that_is_declared_too_large_is_not_waited_for(serve):
    server = await serve()
    for head in (b"", b"Expect: 100-continue\r\n"):
        (reply,) = await send(
            server, HEAD + head + b"Content-Length: 8589934592\r\n\r\n", b"{" * 99
        )
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")


async def test_a_body_of_unknown_size_may_be_too_large(serve):
    server = await serve(server=ServerConfig(port=0, max_body_size="1KiB"))
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    (reply,) = await send(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunk, chunk)
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")


async def test_a_client_that_asks_first_is_told_to_go_on(serve):
    server = await serve()
    asked = HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(GOOD)
    replies = await send(server, asked, GOOD)
    assert [reply.status for reply in replies] == [100, 200]


async def test_a_body_in_pieces(serve):
    server = await serve()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in GOOD)
    (reply,) = await send(
        server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", chunks + b"0\r\n\r\n"
    )
    assert reply.status == 200


async def test_a_body_that_stops_coming(serve, monkeypatch):
    monkeypatch.setattr(reading, "BODY_PATIENCE", 0.05)
    server = await serve()
    (reply,) = await send(server, HEAD + b"Content-Length: 99\r\n\r\n", b'{"prompt":')
    assert (reply.status, reply.error["code"]) == (408, "request_timeout")
    server.assert_idle()


async def test_a_client_that_leaves_amid_its_body(serve):
    server = await serve()
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(HEAD + b"Content-Length: 99\r\n\r\n{")
    await writer.drain()
    writer.close()
    line = 'http_requests_total{handler="/v1/completions",method="POST",status="499"} 1.0'
    await server.until(lambda: line in server.state.http.render().decode())
    assert (await server.complete()).status == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"\xef\xbb\xbf{}", "invalid_json"),
        (b"\xff\xfe{\x00}\x00", "invalid_json"),
        (b"[" * 100_000, "too_large"),
        (b"[" * 2000 + b"]" * 2000, "invalid_json"),
        (b'{"prompt": "\\ud83d"}', "invalid_json"),
        (b'{"prompt": "\xed\xa0\xbd"}', "invalid_json"),
        (b'{"prompt": "a", "temperature": NaN}', "invalid_json"),
        (b'{"prompt": "a", "temperature": -Infinity}', "invalid_json"),
        (b'{"prompt": "a", "temperature": 1e999}', "invalid_json"),
        (b'{"prompt": "a", "seed": 99999999999999999999}', "invalid_type"),
        (b"prompt=a&model=b", "invalid_json"),
        (b"[]", "invalid_type"),
        (b"5", "invalid_type"),
        (b"null", "invalid_type"),
    ],
)
async def test_bodies_that_are_no_object(serve, body, code):
    server = await serve()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        reply = await server.post(path, body)
        if path != "/v1/completions" and b"prompt" in body and code == "invalid_type":
            continue
        assert (reply.status, reply.error["code"]) == (400, code), path


async def test_of_equal_keys_the_last_counts(serve):
    server = await serve("Hello")
    reply = await server.post("/v1/completions", b'{"prompt":"a","max_tokens":1,"max_tokens":3}')
    assert reply.json["choices"][0]["text"] == "Hel"


async def test_any_content_type_will_do(serve):
    server = await serve()
    for kind in (
        "application/json; charset=utf-8",
        "text/plain",
        "application/x-www-form-urlencoded",
    ):
        reply = await server.post("/v1/completions", GOOD, headers={"Content-Type": kind})
        assert reply.status == 200


async def test_methods_of_all_kinds(serve):
    server = await serve()
    for method in ("OPTIONS", "DELETE", "PUT", "PATCH"):
        (reply,) = await send(server, f"{method} /health HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (reply.status, reply.error["code"]) == (405, "method_not_allowed"), method
        assert reply.headers["Allow"] == "GET, HEAD"
    for path, status in (("/health", 200), ("/none", 404), ("/tokenize", 405)):
        (reply,) = await send(
            server, f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), method="HEAD"
        )
        assert reply.status == status
        assert reply.headers["Content-Type"].startswith("application/json")


async def test_paths_of_all_kinds(serve):
    server = await serve()
    for path in ("//", "/%zz", "/v1/../v1", "/v1/models/%00", "/health/", "http://other/none"):
        (reply,) = await send(server, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert reply.status == 404
        assert reply.error["code"] in ("unknown_url", "model_not_found")


def test_a_fault_outside_of_all_handlers_is_not_told_to_clients():
    fault = ArithmeticError("secret")
    request = SimpleNamespace(writer=SimpleNamespace(output_size=0))
    response = Connection.handle_error(None, request, 500, fault)
    assert (response.status, response.keep_alive) == (500, False)
    assert orjson.loads(response.body)["error"]["message"] == "Internal error."
    request.writer.output_size = 1  # an answer has begun: only breaking off is left
    with pytest.raises(ConnectionError):
        Connection.handle_error(None, request, 500, fault)
