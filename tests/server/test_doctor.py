"""`ruvon doctor`: it finds nothing at a sound server, and each fault at one that has it."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import jsonschema
import pytest
from aiohttp import web
from click.testing import CliRunner
from fakes import FakeRunner
from serving import byte_grammars

from ruvon.cli import main
from ruvon.config import ServerConfig
from ruvon.doctor import run
from ruvon.doctor.ask import check_answered, refusal
from ruvon.doctor.check import Check
from ruvon.doctor.expect import Failed, Skipped, misfit, not_empty
from ruvon.doctor.probe import Probe, Reply, parse_frame
from ruvon.doctor.run import choose, examine, run_check
from ruvon.doctor.schema import violation
from ruvon.doctor.schemas import SCHEMAS
from ruvon.engine.matching import Matchers
from ruvon.errors import RuvonError

NEEDS_LOGITS = {
    "chat.logit-bias-forces",
    "chat.logprobs.temperature-does-not-matter",
    "chat.top-p-zero-is-greedy",
    "completions.allowed-token-ids",
    "completions.top-k-one-is-greedy",
    "embeddings.differs",
    *(check.id for check in choose(["extras.decisions*"])),
}
"""The fake model has no distribution that could be bent or read, and one hidden state."""


SLOW = {"responses.compact"}
"""The fake model never ends what it writes for it."""


async def failures(url: str, *globs: str, **options: Any) -> dict[str, str]:
    """Failed checks, optional ones too, and why."""
    checks = [check for check in choose(globs) if check.id not in SLOW]
    _, results = await examine(url, checks, timeout=60, **options)
    return {r.check.id: r.detail for r in results if r.outcome == "fail"}


def obedient() -> FakeRunner:
    """A model that writes nonsense, but what a grammar allows."""
    return FakeRunner(matchers=Matchers(byte_grammars()))


def test_every_check_has_a_name_and_a_title():
    checks = choose([])
    assert len({check.id for check in checks}) == len(checks) > 600
    assert all(check.title.endswith((".", "…")) for check in checks)


async def test_a_sound_server_passes(serve):
    server = await serve(runner=obedient(), numbers={"max_model_len": 2048, "num_blocks": 1024})
    groups = {check.group.partition(".")[0] for check in choose([])} - {"connection", "limits"}
    assert set(await failures(server.url, *groups)) - NEEDS_LOGITS == set()
    await server.until(lambda: server.idle)


async def test_a_server_that_keeps_to_no_grammar_is_found(serve):
    server = await serve(runner=FakeRunner(), numbers={"max_model_len": 2048})
    globs = ("structured.finish", "structured.json-object-begins", "tools.required")
    assert list(await failures(server.url, *globs)) == [
        "structured.json-object-begins", "structured.finish", "tools.required"
    ]  # fmt: skip


async def test_keys(serve):
    server = await serve(server=ServerConfig(port=0, api_key=("sk-right",)))
    _, results = await examine(server.url, choose(["auth"]), api_key="sk-right")
    assert {r.check.id: r.detail for r in results if r.outcome != "pass"} == {
        "auth.any-key-when-open": "the server asks for a key"
    }


@asynccontextmanager
async def answering(answer: Callable[[web.Request], Awaitable[web.Response]]) -> AsyncIterator[str]:
    """A server all of whose paths are one function's."""
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class Loading:
    """A server that is ready when it has been asked so often, at one of the two paths."""

    def __init__(self, path: str, times: float) -> None:
        self.path, self.times = path, times

    async def answer(self, http: web.Request) -> web.Response:
        if http.path == "/v1/models":
            return web.json_response({"data": [{"id": "m"}]})
        if http.path != self.path:
            raise web.HTTPNotFound
        self.times -= 1
        return web.json_response({"phase": "reading"}, status=503 if self.times >= 0 else 200)


@pytest.mark.parametrize("path", ["/ready", "/health"])
async def test_a_server_that_still_loads_is_waited_for(path, monkeypatch):
    monkeypatch.setattr(run, "POLL", 0.001)
    async with answering(Loading(path, 3).answer) as url:
        model, results = await examine(url, choose(["models.list-object"]))
    assert (model, results[0].outcome) == ("m", "fail")


async def test_a_server_that_does_not_become_ready_is_told(monkeypatch):
    monkeypatch.setattr(run, "POLL", 0.001)
    async with answering(Loading("/ready", math.inf).answer) as url:
        with pytest.raises(RuvonError, match=r"not ready after 0.01 s; it says .*reading"):
            await examine(url, [], patience=0.01)


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

    async with aiohttp.ClientSession() as session, answering(forward) as address:
        yield address


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
        ("structured.schema.boolean", swap('"ok', '"okay')),
        ("tools.call-ids-unique", swap('"call_[0-9a-f]+"', '"call_1"')),
        ("tools.required-finish", swap('"finish_reason":"tool_calls"', '"finish_reason":"stop"')),
        ("tools.stream.id-once", swap('"index":0,"function"', '"index":0,"id":"x","function"')),
        ("responses.usage", swap('"input_tokens_details":[^}]*},', "")),
        ("responses.stream.event-names", swap("event: response.incomplete", "event: end")),
        ("responses.stream.sequence-numbers", swap('"sequence_number":3', '"sequence_number":4')),
        ("responses.stream.items-are-the-output", number('"id":"msg_')),
        ("messages.stop-reason", swap('"stop_reason":"max_tokens"', '"stop_reason":"length"')),
        ("messages.stream.no-done", lambda body: body + b"data: [DONE]\n\n"),
        ("embeddings.base64-equals-float", swap('"embedding":"....', '"embedding":"AAAA')),
        ("extras.tokenize-count", swap('"count":', '"count":1')),
        ("security.no-traceback", swap('"message":"', '"message":"Traceback ')),
    ],
)  # fmt: skip
async def test_a_fault_is_found(serve, check: str, change: Change):
    server = await serve(runner=obedient())
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


VALUES = [
    None, True, 0, 1, 4, 15, 2.0, 2.5, -1, "", "red", "abcd", "AB-123", "x" * 30, [], [1],
    [1, True], [1, 2, 3, 4], {}, {"ok": True}, {"ok": 1}, {"a": None}, {"n": 4}, {"n": 15},
    {"x": 1}, {"x": 2.5},
    {"c": "red"}, {"c": 1}, {"c": True}, {"kind": "sea", "ok": False}, {"a": [1, True]}, {"a": [1]},
    {"s": None}, {"s": "abcd"}, {"s": "AB-123"}, {"v": 1}, {"v": {"ok": True}}, {"v": None},
    {"a": {"ok": True}, "b": {"ok": False}}, {"root": {"value": True, "next": None}},
    {"root": {"value": True, "next": {"value": 1, "next": None}}}, {"any": True, "more": False},
]  # fmt: skip


@pytest.mark.parametrize(("name", "schema"), [(name, schema) for name, _, schema, _ in SCHEMAS])
def test_the_validator_agrees_with_jsonschema(name: str, schema: Any):
    known = jsonschema.Draft202012Validator(schema)
    for value in VALUES:
        assert (violation(value, schema) is None) == known.is_valid(value), value


def test_what_the_validator_adds_and_does_not_know():
    date = {"type": "string", "format": "date"}
    assert violation("2026-11-26", date) is None
    assert violation("tomorrow", date) == "$: 'tomorrow' breaks format date"
    assert violation({"a": [1, "x"]}, {"properties": {"a": {"items": {"type": "integer"}}}}) == (
        "$.a[1]: 'x' is no integer"
    )
    with pytest.raises(ValueError, match="no check of not"):
        violation(1, {"not": {}})


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
