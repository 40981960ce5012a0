"""Loading, leaving clients, slow clients, draining: what happens around requests."""

from __future__ import annotations

import asyncio
import gc
import os
import shlex
import signal
import socket
import sys
import threading
from types import SimpleNamespace

import aiohttp
import orjson
import pytest
import uvloop
from aiohttp import web
from serving import ScriptRunner, fake_start
from structlog.testing import capture_logs

from ruvon.config import EngineConfig, ServerConfig
from ruvon.errors import ConfigError, LoadError
from ruvon.server import console, lifecycle
from ruvon.server.app import create_app, drain, make_runner, run, watch_signals
from ruvon.server.events import EventResponse
from ruvon.server.listen import listen, listen_unix
from ruvon.server.openapi import dialects
from ruvon.server.state import STATE, State


class Slow:
    """A ``start`` that waits in its thread until it is told to go on, or to fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go = threading.Event()
        self._error = error
        self._start = fake_start(ScriptRunner("Hello"), EngineConfig())

    def __call__(self, config, progress):
        progress("loading weights", 0.42)
        assert self.go.wait(30)
        if self._error is not None:
            raise self._error
        return self._start(config, progress)


async def test_it_answers_while_loading(serve):
    start = Slow()
    server = await serve(start=start, wait=False)
    await server.until(lambda: server.state.share)
    ready = await server.get("/ready")
    assert ready.status == 503
    assert ready.json == {"status": "loading", "phase": "loading weights", "percent": 42}
    assert (await server.get("/live")).status == 200
    health = await server.get("/health")
    assert (health.status, health.json) == (503, {"status": "loading"})
    assert b"http_requests_total" in (await server.get("/metrics")).body
    assert (await server.get("/version")).status == 200
    for reply in (await server.chat(), await server.get("/v1/models")):
        assert (reply.status, reply.error["code"]) == (503, "not_ready")
        assert "loading weights, 42%" in reply.error["message"]
        assert int(reply.headers["Retry-After"]) > 0
    start.go.set()
    await server.until(lambda: server.state.service)
    assert (await server.get("/ready")).json == {
        "status": "ready",
        "phase": "ready",
        "percent": 100,
    }
    assert (await server.get("/health")).json == {"status": "ok"}
    assert (await server.chat()).status == 200


async def test_a_failed_load_ends_the_run_with_its_error():
    start = Slow(LoadError("model.safetensors: tensor lm_head is missing"))
    start.go.set()
    app = create_app(EngineConfig(), ServerConfig(port=0), start)
    with pytest.raises(LoadError, match="lm_head is missing"):
        await run(app)


async def test_a_missing_chat_template_file_ends_the_run():
    app = create_app(
        EngineConfig(),
        ServerConfig(port=0, chat_template="/nowhere/template.jinja"),
        fake_start(ScriptRunner(""), EngineConfig()),
    )
    with pytest.raises(ConfigError, match="chat_template"):
        await run(app)


async def test_a_chat_template_of_ones_own(serve, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    server = await serve("ok", server=ServerConfig(port=0, chat_template=str(template)))
    ids = (await server.chat("Hi", return_token_ids=True)).json["prompt_token_ids"]
    assert bytes(ids) == b"[Hi]"


async def test_a_served_name_that_is_none_ends_the_run():
    server = ServerConfig(port=0, served_model_name=" , ")
    app = create_app(EngineConfig(), server, fake_start(ScriptRunner(""), EngineConfig()))
    with pytest.raises(ConfigError, match="served_model_name"):
        await run(app)


async def test_log_lines_of_a_run(serve, monkeypatch):
    monkeypatch.setattr(lifecycle, "STATS_EVERY", 0.05)
    with capture_logs() as logs:
        server = await serve("Hello")
        await server.chat("Hi", stream=True)
        await server.until(lambda: any(entry["event"] == "stats" for entry in logs))
    entries = {entry["event"]: entry for entry in logs}
    assert entries["loading"]["phase"] == "pretending"
    assert entries["ready"]["model"] == "org/fake"
    assert entries["ready"]["steps"] == "of at most 64 sequences and 512 tokens"
    request = entries["request"]
    assert request["ttft_ms"] > 0
    assert request["bytes"] > 1000
    assert request["user_agent"].startswith("Python/")
    for name in ("ttft_ms", "ms", "id", "bytes", "user_agent", "queue_ms", "prefill_ms",
                 "decode_ms"):  # fmt: skip
        del request[name]
    assert request == {
        "event": "request", "log_level": "info", "method": "POST", "path": "/v1/chat/completions",
        "status": 200, "stream": True, "prompt_tokens": 21, "cached_tokens": 0, "output_tokens": 6,
        "client": "127.0.0.1", "finish": "stop",
    }  # fmt: skip
    assert entries["stats"]["output_tok_s"] > 0


async def test_request_lines_can_be_off(serve):
    with capture_logs() as logs:
        server = await serve("Hello", server=ServerConfig(port=0, log_requests=False))
        await server.chat()
    assert not any(entry["event"] == "request" for entry in logs)


def test_sizes_for_people():
    sizes = [lifecycle.size(n) for n in (0, 1023, 1024, 1536, 3 << 30, 1 << 60)]
    assert sizes == ["0.0 B", "1023.0 B", "1.0 KiB", "1.5 KiB", "3.0 GiB", "1048576.0 TiB"]


async def test_a_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        runner = make_runner(create_app(EngineConfig(), ServerConfig(), Slow()))
        await runner.setup()
        with pytest.raises(ConfigError, match=f"port {port}: Address already in use$"):
            await listen(runner, "127.0.0.1", port)
        await runner.cleanup()


async def test_a_unix_socket_of_another_server_is_in_use_and_one_left_behind_is_not(tmp_path):
    path = str(tmp_path / "s")
    for _ in range(2):  # the first leaves it behind
        runner = make_runner(bare_app())
        await runner.setup()
        await listen_unix(runner, path)
        with pytest.raises(ConfigError, match=f"listen on {path}: Address already in use$"):
            await listen_unix(runner, path)
        _, writer = await asyncio.open_unix_connection(path)
        writer.close()
        await writer.wait_closed()
        await runner.cleanup()


def test_what_listens_on_a_unix_socket_has_no_port():
    with capture_logs() as logs:
        console.tell_address(ServerConfig(uds="/s"), "127.0.0.1", 8000, dialects())
    assert logs[0]["url"] == "unix:/s"
    assert "port" not in logs[0]


async def test_a_file_is_no_unix_socket(tmp_path):
    path = tmp_path / "s"
    path.write_text("kept")
    runner = make_runner(bare_app())
    await runner.setup()
    with pytest.raises(ConfigError, match="Address already in use"):
        await listen_unix(runner, str(path))
    await runner.cleanup()
    assert path.read_text() == "kept"


def bare_app() -> web.Application:
    """What listens, and serves nothing."""
    app = web.Application()
    app[STATE] = State(EngineConfig(), ServerConfig(), 1)
    return app


async def test_an_address_of_another_machine_is_named():
    runner = make_runner(bare_app())
    await runner.setup()
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 port 80"):
        await listen(runner, "192.0.2.1", 80)
    with pytest.raises(ConfigError, match=r"nowhere\.invalid"):
        await listen(runner, "nowhere.invalid", 0)
    await runner.cleanup()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
async def test_all_of_ipv6_is_all_of_ipv4_too():
    runner = make_runner(bare_app())
    await runner.setup()
    _, port = await listen(runner, "::", 0)
    for host in ("127.0.0.1", "::1"):
        _, writer = await asyncio.open_connection(host, port)
        writer.close()
        await writer.wait_closed()
    await runner.cleanup()


def test_many_connections_are_accepted_in_one_turn_of_the_loop():
    """uvloop alone takes one for each listener and turn, and a turn may hold a step."""

    async def turns_to_accept(count):
        runner = make_runner(bare_app())
        await runner.setup()
        address = await listen(runner, "127.0.0.1", 0)
        clients = [socket.create_connection(address) for _ in range(count)]
        turns = 0
        while len(runner.server.connections) < count:
            turns += 1
            await asyncio.sleep(0)
        for client in clients:
            client.close()
        await runner.cleanup()
        return turns

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        turns = [runner.run(turns_to_accept(count)) for count in (1, 64)]
    assert turns[1] - turns[0] <= 4


# ------------------------------------------------------------------------------ leaving clients


async def raw_request(server, body, buffer=0):
    """A connection with a chat on it, nothing read yet. ``buffer``: what its socket takes in."""
    host, port = server.url.removeprefix("http://").split(":")
    end = socket.socket()
    end.setblocking(False)
    if buffer:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    await asyncio.get_running_loop().sock_connect(end, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=end)
    data = orjson.dumps(body)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    return reader, writer


BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_frees_its_blocks_within_a_step(serve, stream, n):
    server = await serve(runner=ScriptRunner("x" * 1000, by_hand=True))
    _, writer = await raw_request(server, BODY | {"stream": stream, "n": n})
    await server.until(lambda: server.num_live == n)
    for _ in range(3):
        await server.until(lambda: server.fake.num_held)
        server.fake.finish_step()
    await server.until(lambda: server.fake.num_held)
    writer.transport.abort()
    await server.until(lambda: not server.num_live)
    server.fake.finish_step()  # the one that was under way
    await server.until(lambda: server.idle)
    assert len(server.fake.plans) == 4
    text = (await server.get("/metrics")).body.decode()
    assert f'finished_reason="abort",model_name="org/fake"}} {n}.0' in text
    assert 'http_requests_total{handler="/v1/chat/completions",method="POST",status="499"}' in text


async def test_a_stream_that_finds_its_client_gone_is_logged_as_such(serve, monkeypatch):
    """Not as 200, though that is what went out."""
    server = await serve("Hello")

    async def gone(self, data):
        raise ConnectionResetError

    monkeypatch.setattr(EventResponse, "write", gone)
    with capture_logs() as logs:
        await server.chat(stream=True)
    (line,) = (entry for entry in logs if entry["event"] == "request")
    assert line["status"] == 499


async def test_leaving_while_queued(serve):
    server = await serve(runner=ScriptRunner("x", by_hand=True), max_num_seqs=1)
    first = asyncio.create_task(server.chat())
    await server.until(lambda: server.fake.num_held)
    _, writer = await raw_request(server, BODY)
    await server.until(lambda: server.num_live == 2)
    writer.close()
    await server.until(lambda: server.num_live == 1)
    await server.finish(first)
    assert first.result().status == 200
    server.assert_idle()


async def test_a_thousand_connects_and_disconnects_leave_nothing(serve):
    server = await serve("x" * 1000, numbers={"num_blocks": 4096})
    gc.collect()
    before = len(asyncio.all_tasks())

    async def visit(number: int) -> None:
        stream = number % 2 == 0
        reader, writer = await raw_request(server, BODY | {"stream": stream})
        if stream and number % 3:
            await reader.read(number % 7 * 40 + 1)
        writer.transport.abort()

    for start in range(0, 1000, 100):
        await asyncio.gather(*(visit(number) for number in range(start, start + 100)))
    await server.until(lambda: server.idle)
    await server.until(lambda: len(asyncio.all_tasks()) <= before)
    assert (await server.chat(max_tokens=1)).status == 200


# ---------------------------------------------------------------------------------- slow clients


async def test_a_slow_reader_stalls_nobody_and_is_bounded(serve):
    server = await serve("x" * 400, numbers={"num_blocks": 512})
    reader, writer = await raw_request(
        server, BODY | {"stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}, buffer=4096
    )
    writer.transport.pause_reading()
    await server.until(lambda: server.runner.server.connections)
    for connection in server.runner.server.connections:
        sending = connection.transport.get_extra_info("socket")
        sending.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    await server.until(lambda: server.num_live)
    for _ in range(3):
        assert (await server.chat(max_tokens=3)).status == 200
    await server.until(lambda: server.idle)  # computed to the end, though nobody reads
    buffered = [c.transport.get_write_buffer_size() for c in server.runner.server.connections]
    assert 0 < max(buffered) < 256 * 1024  # of more than a megabyte
    writer.transport.resume_reading()
    data = await read_chunked(reader)
    assert len(data) > 1_500_000
    assert data.count(b'"token":"x","bytes":[120],"logprob":-0.5,"top_logprobs"') == 4 * 400
    assert data.endswith(b"data: [DONE]\n\n")
    writer.close()


async def read_chunked(reader):
    """The body of a response in chunked encoding."""
    await reader.readuntil(b"\r\n\r\n")
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    return body


async def test_chunks_grow_while_the_reader_is_busy(serve, monkeypatch):
    """Several steps between two reads of a stream are one chunk."""
    server = await serve("Hello", runner=ScriptRunner("Hello", by_hand=True))
    streams, generate = [], server.service.generator.generate
    monkeypatch.setattr(
        server.service.generator,
        "generate",
        lambda *args: streams.append(generate(*args)) or streams[-1],
    )
    task = asyncio.create_task(server.chat(stream=True))
    await server.until(lambda: server.fake.num_held)
    (stream,) = streams
    wake, stream.wake = stream.wake, lambda: None  # the reader hears of nothing until the end
    while stream.open:
        if server.fake.num_held:
            server.fake.finish_step()
        await asyncio.sleep(0)
    wake()
    deltas = [event["choices"][0]["delta"] for event in (await task).events]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hello"}, {}]


async def test_silence_is_filled_with_comments(serve):
    runner = ScriptRunner("ok", by_hand=True)
    server = await serve(runner=runner, server=ServerConfig(port=0, sse_keep_alive_interval=0.1))
    async with server.session.post(
        server.url + "/v1/chat/completions", data=orjson.dumps(BODY | {"stream": True})
    ) as response:
        assert response.status == 200  # though there is no token yet
        first = await response.content.readuntil(b"\n\n")
        assert b'"role":"assistant"' in first
        for _ in range(3):
            assert await response.content.readuntil(b"\n\n") == b": prefill 21/21\n\n"
        server.fake.finish_step()
        await server.until(lambda: server.fake.num_held)
        assert b'"content":"o"' in await response.content.readuntil(b"\n\n")
        assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
        rest = asyncio.create_task(response.read())
        await server.finish(rest)
        assert rest.result().endswith(b"data: [DONE]\n\n")


# -------------------------------------------------------------------------------------- draining


async def test_draining_lets_running_requests_finish(serve):
    server = await serve(runner=ScriptRunner("Hello", by_hand=True))
    running = asyncio.create_task(server.chat(stream=True))
    await server.until(lambda: server.fake.num_held)
    draining = asyncio.create_task(drain(server.state))
    await server.until(lambda: server.state.draining)
    ready = await server.get("/ready")
    assert ready.status == 503
    assert ready.json == {"status": "draining", "phase": "draining", "percent": 100}
    assert (await server.get("/health")).status == 200
    refused = await server.chat()
    assert (refused.status, refused.error["code"]) == (503, "shutting_down")
    assert "Retry-After" in refused.headers
    await server.finish(running, draining)
    assert running.result().events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_draining_has_an_end(serve):
    server = await serve(
        runner=ScriptRunner("x" * 1000, by_hand=True),
        server=ServerConfig(port=0, shutdown_timeout=0),
    )
    running = asyncio.create_task(server.chat(stream=True, max_tokens=400))
    await server.until(lambda: server.fake.num_held)
    server.fake.finish_step()
    await server.until(lambda: server.fake.num_held)
    draining = asyncio.create_task(drain(server.state))
    with capture_logs() as logs:
        await server.finish(running, draining)
    assert running.result().status == 200  # it went out with the first token
    assert running.result().events[-1]["error"]["code"] == "shutting_down"
    (line,) = (entry for entry in logs if entry["event"] == "request")
    assert line["status"] == 503
    assert 'status="503"' in (await server.get("/metrics")).body.decode()


async def test_a_second_signal_ends_at_once_and_says_why(serve, monkeypatch):
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr("ruvon.server.signals.SAME_SIGNAL", -1)
    server = await serve(runner=ScriptRunner("Hello", by_hand=True))
    running = asyncio.create_task(server.chat())
    await server.until(lambda: server.fake.num_held)
    watch_signals(server.state, reload=lambda: None)
    with capture_logs() as logs:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            await server.until(lambda number=number: any(number.name in str(x) for x in logs))
    assert ends == [128 + signal.SIGINT]
    assert [entry["event"] for entry in logs] == ["draining", "ended"]
    assert logs[0]["unfinished"] == logs[1]["unfinished"] == 1
    assert "second signal" in logs[1]["why"]
    await server.finish(running)


async def test_a_signal_sent_to_the_process_and_its_group_counts_once(serve, monkeypatch):
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    server = await serve("Hello")
    watch_signals(server.state, reload=lambda: None)
    with capture_logs() as logs:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            await server.until(lambda: server.state.draining)
            await server.chat()  # the loop turns
    assert ends == []
    assert [entry["event"] for entry in logs if entry["event"] != "request"] == ["draining"]


async def test_a_hangup_reloads_and_ends_the_server_of_a_terminal_that_is_gone(serve, monkeypatch):
    reloads = []
    server = await serve("Hello")
    terminal, ours = os.openpty()
    monkeypatch.setattr("ruvon.server.signals.STDERR", ours)
    watch_signals(server.state, reload=lambda: reloads.append(1))
    signal.raise_signal(signal.SIGHUP)
    await server.until(lambda: reloads)
    assert not server.state.draining
    os.close(terminal)
    signal.raise_signal(signal.SIGHUP)
    await server.until(lambda: server.state.draining)
    assert len(reloads) == 1
    os.close(ours)


async def test_what_the_terminal_says_to_type_is_answered(serve, capsys, monkeypatch):
    server = await serve("Red, green, blue")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    host, port = server.url.removeprefix("http://").split(":")
    facts = {"model": "org/fake", "kv_cache": "1 MiB of float16"}
    console.announce(server.state.server, facts, 1.0, (host, int(port)))
    said = capsys.readouterr().err
    assert "1 MiB of float16" in said
    (line,) = (line for line in said.splitlines() if "curl" in line)
    _, url, *options = shlex.split(line)
    assert url.startswith(server.url)
    reply = await server.post(
        url.removeprefix(server.url), options[options.index("-d") + 1].encode()
    )
    assert reply.json["choices"][0]["message"]["content"] == "Red, green, blue"


@pytest.mark.parametrize(
    ("host", "asked"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::2", "[::2]")]
)
def test_what_is_listened_on_and_where_one_asks(host, asked):
    told = console.first_request(host, 80, ServerConfig())
    assert f"curl http://{asked}:80/v1" in told
    assert "Bearer" not in told
    keyed = ServerConfig(api_key=("k",), tls_cert="cert.pem")
    told = console.first_request(host, 80, keyed)
    assert f"https://{asked}" in told
    assert "Authorization: Bearer" in told


@pytest.mark.parametrize("watched", [True, False])
def test_a_terminal_shows_a_bar_and_a_file_gets_lines(capsys, monkeypatch, watched):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched)
    with capture_logs() as logs, console.loading(ServerConfig()) as show:
        console.tell_address(ServerConfig(), "127.0.0.1", 80, dialects())
        for share in (0.0, 0.5, 1.0):
            show("loading weights", share)
    events = [entry["event"] for entry in logs]
    assert events == ([] if watched else ["listening", "loading"])
    said = capsys.readouterr().err
    for word in ("http://127.0.0.1:80/\n", "OpenAI", "/v1/embeddings", "Anthropic", "/v1/messages"):
        assert (word in said) == watched
    assert "/v1/messages/count_tokens" not in said
    assert watched or logs[0]["speaks"] == ["OpenAI", "Anthropic", "Ollama"]
    assert not console.is_watched(ServerConfig(log_format="json"))


async def test_one_connection_serves_many_requests(serve):
    server = await serve("ok")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
        server.session = session
        for stream in (True, False, True):
            assert (await server.chat(stream=stream)).status == 200
        assert len(session.connector._conns) == 1


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        ((0,), ""),
        ((4096,), ", in 1 group that sees 4096"),
        ((0, 128), ", in 2 groups that see all, 128"),
    ],
)
def test_the_start_tells_what_cache_groups_see(windows, said):
    assert lifecycle.in_groups(SimpleNamespace(windows=windows)) == said
