"""`ruvon doctor`: it finds nothing at a sound server, and each fault at one that has it."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from click.testing import CliRunner
from fakes import FakeRunner

from ruvon.cli import main
from ruvon.doctor.ask import check_answered, refusal
from ruvon.doctor.check import Check
from ruvon.doctor.expect import Failed, Skipped, misfit, not_empty
from ruvon.doctor.probe import Probe, Reply, parse_frame
from ruvon.doctor.run import choose, examine, run_check

NEEDS_LOGITS = {
    "chat.logit-bias-forces",
    "chat.logprobs.temperature-does-not-matter",
    "chat.top-p-zero-is-greedy",
    "completions.allowed-token-ids",
    "completions.top-k-one-is-greedy",
}
"""The fake model draws from no distribution that could be bent."""

UNSERVED = {"models.anthropic-list", "models.anthropic-edges"}


async def failures(url: str, *globs: str) -> dict[str, str]:
    """Failed checks, optional ones too, and why."""
    _, results = await examine(url, choose(globs), timeout=10)
    return {r.check.id: r.detail for r in results if r.outcome == "fail"}


def test_every_check_has_a_name_and_a_title():
    checks = choose([])
    assert len({check.id for check in checks}) == len(checks) > 300
    assert all(check.title.endswith((".", "…")) for check in checks)


async def test_a_sound_server_passes(serve):
    server = await serve(runner=FakeRunner(), numbers={"max_model_len": 2048})
    found = await failures(
        server.url, "models", "chat", "completions", "errors", "sse", "http", "security"
    )
    assert set(found) - NEEDS_LOGITS - UNSERVED == set()
    await server.until(lambda: server.idle)


# ---------------------------------------------------------------------- servers with one fault

Change = Callable[[bytes], bytes]


@asynccontextmanager
async def changed(url: str, change: Change) -> AsyncIterator[str]:
    """A server that answers as the one at ``url`` does, but for ``change`` of each body."""

    async def forward(http: web.Request) -> web.Response:
        kept = {k: v for k, v in http.headers.items() if k in ("Content-Type", "Authorization")}
        async with session.request(
            http.method, url + http.path_qs, data=await http.read(), headers=kept
        ) as reply:
            body = change(await reply.read())
            headers = {k: v for k, v in reply.headers.items() if k.startswith(("X-", "Cache"))}
            headers["Content-Type"] = reply.headers.get("Content-Type", "text/plain")
            return web.Response(status=reply.status, body=body, headers=headers)

    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    async with aiohttp.ClientSession() as session:
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


def swap(old: str, new: str, count: int = 0) -> Change:
    return lambda body: re.sub(old.encode(), new.encode(), body, count=count)


def number(old: str) -> Change:
    """Put another number after each."""
    numbers = itertools.count()
    return lambda body: re.sub(old.encode(), lambda m: m[0] + b"%d" % next(numbers), body)


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("models.list-fields", swap('"owned_by":"[^"]*",', "")),
        ("models.list-object", swap('"object":"list"', '"object":"models"')),
        ("chat.object", swap('"chat.completion"', '"text_completion"')),
        ("chat.usage-adds-up", swap('"total_tokens":', '"total_tokens":1')),
        ("chat.no-empty-tool-calls", swap('"refusal":null,', '"refusal":null,"tool_calls":[],')),
        ("chat.logprobs-null", swap('"logprobs":null,', "")),
        ("chat.finish-reason", swap('"finish_reason":"length"', '"finish_reason":"eos"')),
        ("chat.max-tokens", swap('"completion_tokens":8', '"completion_tokens":9')),
        ("chat.greedy-repeats", number('"content":"')),
        ("chat.logprobs.finite", swap('"logprob":-[0-9.]+', '"logprob":0.5')),
        ("chat.logprobs.finite", swap('"logprob":-[0-9.]+', '"logprob":-Infinity')),
        ("chat.stream.id-stable", number('"id":"chatcmpl-')),
        ("chat.stream.role-first", swap('"role":"assistant",', "")),
        ("chat.stream.role-once", swap('"delta":{', '"delta":{"role":"assistant",')),
        ("chat.stream.finish-separate", swap('"delta":{}', '"delta":{"content":"!"}')),
        ("chat.stream.finish-once", swap('"finish_reason":null', '"finish_reason":"stop"')),
        ("chat.stream.no-usage", swap(']}\n\n', '],"usage":{"total_tokens":1}}\n\n')),
        ("chat.stream.usage-null-before", swap(',"usage":null', "")),
        ("chat.stream.text-as-whole", swap('"delta":{"content":"[a-z ]', '"delta":{"content":"')),
        ("completions.object", swap('"text_completion"', '"completion"')),
        ("completions.logprobs.offsets", swap('"text_offset":.0,1', '"text_offset":[0,2')),
        ("completions.stream.text-as-whole", swap('"text":"[a-z ]"', '"text":"é"')),
        ("errors.nested", swap('."error":(.*).$', "\\\\1")),
        ("errors.type", swap('"invalid_request_error"', '"BadRequestError"')),
        ("errors.chat.stop-type", swap('"param":"stop"|stop', '"param":null')),
        ("errors.short", lambda body: body + b" " * 30_000),
        ("sse.done-last", swap("data: .DONE.\n\n", "")),
        ("sse.done-once", swap("data: .DONE.\n\n", "data: [DONE]\n\ndata: [DONE]\n\n")),
        ("sse.frames", swap("data: ", "data:")),
        ("sse.ends-with-an-empty-line", lambda body: body.rstrip()),
        ("security.no-traceback", swap('"message":"', '"message":"Traceback ')),
    ],
)  # fmt: skip
async def test_a_fault_is_found(serve, check: str, change: Change):
    server = await serve(runner=FakeRunner())
    async with changed(server.url, change) as url:
        assert list(await failures(url, check)) == [check]


# ---------------------------------------------------------------------- what counts as what


async def ask_with(error: Exception | None) -> str:
    async def ask(probe: Probe) -> None:
        if error is not None:
            raise error

    async with aiohttp.ClientSession() as session:
        result = await run_check(Check("a.b", "It does.", ask), Probe(session, "http://x"), 1.0)
    return f"{result.outcome}: {result.detail}"


async def test_whatever_a_check_raises_is_its_result():
    assert await ask_with(None) == "pass: "
    assert await ask_with(Failed("no")) == "fail: no"
    assert await ask_with(Skipped("not here")) == "skip: not here"
    assert await ask_with(KeyError("choices")) == "fail: KeyError: 'choices'"


async def test_a_check_has_a_time_limit():
    async def ask(probe: Probe) -> None:
        await asyncio.Event().wait()

    async with aiohttp.ClientSession() as session:
        result = await run_check(Check("a.b", "It does.", ask), Probe(session, "http://x"), 0.01)
    assert (result.outcome, result.detail) == ("fail", "no end within 0.01 s")


def reply(status: int, **error: object) -> Reply:
    return Reply("POST /v1/x", status, {}, json.dumps({"error": error}).encode())


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (reply(404, message="Not Found"), Skipped),
        (reply(501, message="later"), Skipped),
        (reply(404, message="no", code="model_not_found"), Failed),
        (reply(400, message="'tools' is not supported."), Skipped),
        (reply(400, message="No.", param="tools", code="unsupported_parameter"), Skipped),
        (reply(400, message="'n' is not supported."), Failed),
        (reply(500, message="'tools' is not supported."), Failed),
    ],
)
def test_what_is_not_offered_is_skipped(answer: Reply, outcome: type[Exception]):
    with pytest.raises(outcome):
        check_answered(answer, ["tools"])


def test_a_refusal_names_its_field():
    said = {"message": "Input should be a number.", "type": "t", "code": None}
    refusal(reply(400, **said, param="messages[0].role"), names="messages[0].role")
    with pytest.raises(Failed, match="names stop"):
        refusal(reply(400, **said, param="top_p"), names="stop")
    with pytest.raises(Failed, match="expected 400; got 422"):
        refusal(reply(422, **said, param="stop"), names="stop")
    with pytest.raises(Skipped):
        refusal(reply(404, message="Not Found"))


@pytest.mark.parametrize(
    ("value", "shape", "wrong"),
    [
        ({"a": 1}, {"a": int, "b?": str}, None),
        ({"a": True}, {"a": int}, "a: expected int; got true"),
        ({"a": [1, "x"]}, {"a": [int]}, 'a[1]: expected int; got x'),
        ({}, {"a": int}, "a is missing; there are no fields"),
        ({"a": None}, {"a": (str, None)}, None),
        ({"a": ""}, {"a": not_empty}, "a: expected not empty; got "),
        ({"a": 1.5}, {"a": float}, None),
        ({"a": float("inf")}, {"a": float}, "a: expected float; got Infinity"),
        ({"a": {"b": 1}}, {"a": {"b": "x"}}, "a.b: expected x; got 1"),
    ],
)  # fmt: skip
def test_shapes(value: object, shape: object, wrong: str | None):
    assert misfit(value, shape) == wrong


def test_frames():
    frame = parse_frame(b'event: a\ndata: {"b":\ndata: 1}')
    assert (frame.event, frame.data) == ("a", '{"b":\n1}')
    assert parse_frame(b": keep-alive").data is None


# ---------------------------------------------------------------------- the command


async def test_the_command_reports_and_fails(serve, tmp_path):
    server = await serve(runner=FakeRunner())
    report = tmp_path / "report.json"
    async with changed(server.url, swap('"chat.completion"', '"x"')) as url:
        arguments = ["doctor", f"{url}/v1/", "--only", "chat.o*", "--json", str(report)]
        done = await asyncio.to_thread(CliRunner().invoke, main, arguments)
    assert done.exit_code == 1
    assert "FAIL chat.object" in done.output
    assert "object: expected chat.completion; got x" in done.output
    found = json.loads(report.read_bytes())
    assert found["counts"] == {"passed": 0, "failed": 1, "optional_failed": 0, "skipped": 0}
    assert found["checks"][0]["id"] == "chat.object"


def test_the_command_without_a_server():
    invoke = CliRunner().invoke
    assert "cannot be reached" in invoke(main, ["doctor", "http://127.0.0.1:9"]).output
    assert "no check is called" in invoke(main, ["doctor", "http://x", "--only", "nope"]).output
    assert "BASE_URL is missing" in invoke(main, ["doctor"]).output
    assert "sse.done-last: The last event is [DONE]." in invoke(main, ["doctor", "--list"]).output
