"""The page at ``/``: who gets it, what keeps it safe, and what it is told of the engine."""

from __future__ import annotations

import asyncio
import base64
import re
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from serving import FakeLens, ScriptRunner, Server

import ruvon
from ruvon.config import ServerConfig
from ruvon.server.watch import WATCHERS

ROOT = Path(ruvon.__file__).parent
FILES = sorted((ROOT / "server" / "ui").iterdir())
KEYED = ServerConfig(port=0, api_key=("k",), admin_key=("boss",))
GATED = ServerConfig(port=0, ui_step_gate=True)
LONG = {"prompt": "Hi", "max_tokens": 40, "ignore_eos": True}


@pytest.mark.parametrize(
    ("fields", "has_page"),
    [
        ({}, True),
        ({"host": "localhost"}, True),
        ({"host": "::1"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "10.0.0.1"}, False),
        ({"uds": "/run/r.sock"}, False),
        ({"ui": False}, False),
        ({"host": "0.0.0.0", "ui": True}, True),
    ],
)
def test_only_this_machine_has_it_unless_asked(fields, has_page):
    assert ServerConfig(**fields).has_page is has_page


async def test_its_files_are_sent_with_a_strict_policy(serve):
    server = await serve("Hello")
    for path in ["/", *[f"/ui/{file.name}" for file in FILES]]:
        reply = await server.get(path)
        assert reply.status == 200
        policy = reply.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        again = await server.get(path, headers={"If-None-Match": reply.headers["ETag"]})
        assert (again.status, again.body) == (304, b"")
    assert (await server.get("/ui/none.js")).status == 404
    assert (await server.get("/ui/..%2Fapp.py")).status == 404


async def test_it_is_not_there_where_it_is_off(serve):
    server = await serve("Hello", server=ServerConfig(port=0, ui=False))
    assert [(await server.get(path)).status for path in ("/", "/ui/main.js")] == [404, 404]


def test_it_needs_nothing_from_elsewhere_and_parses_no_markup():
    names = {file.name for file in FILES}
    for file in FILES:
        text = file.read_text()
        links = re.findall(r"""(?:src|href)=["'](?!#)/ui/([^"']+)|from "\./([^"]+)""", text)
        assert {a or b for a, b in links} <= names, file
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(", text)
        assert not re.search(r"""(?:src|href|url)[=(]["']?https?:""", text), file
    assert not re.search(
        r"<script(?![^>]*src=)|\son\w+=|style=", (FILES[0].parent / "index.html").read_text()
    )


def test_the_package_has_it():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["ruvon"]
    packed = {path for pattern in patterns for path in ROOT.glob(pattern)}
    assert {*FILES} <= packed


async def test_what_it_shows_is_behind_the_keys(serve):
    server = await serve("Hello", server=KEYED)
    assert (await server.get("/")).status == 200
    assert (await server.get("/ui/main.js")).status == 200
    assert (await server.get("/about")).status == 401
    key, boss = ({"x-api-key": name} for name in ("k", "boss"))
    assert (await server.get("/about", headers=key)).json["model"] == "org/fake"
    for path in ("/debug/live", "/debug/trace"):
        assert (await server.get(path)).status == 401
        assert (await server.get(path, headers=key)).status == 403
    async with watching(server, headers=boss) as messages:
        assert (await anext(messages))["kind"] == "begin"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"X-Forwarded-For": "10.0.0.9"}, 403),
        ({"Forwarded": "for=10.0.0.9"}, 403),
    ],
)
async def test_without_keys_only_this_machine_watches(serve, headers, status):
    server = await serve("Hello")
    async with server.session.get(server.url + "/debug/live", headers=headers) as reply:
        assert reply.status == status
    assert (await server.get("/debug/trace", headers=headers)).status == 403


@asynccontextmanager
async def watching(server: Server, **options: Any) -> AsyncIterator[AsyncIterator[Any]]:
    """The messages of `/debug/live`."""

    async def messages(reply: Any) -> AsyncIterator[Any]:
        async for line in reply.content:
            if line.startswith(b"data: "):
                yield orjson.loads(line[6:])

    async with server.session.get(server.url + "/debug/live", **options) as reply:
        assert reply.status == 200, await reply.read()
        yield messages(reply)


async def test_every_step_is_told_once_and_no_text(serve):
    server = await serve("the launch code is 0451")
    async with watching(server) as messages:
        begin = await anext(messages)
        assert begin["made_of"]["num_blocks"] == 256
        assert begin["standing"]["sequences"] == []
        task = asyncio.create_task(server.complete("my secret", max_tokens=9))
        events: list[Any] = []
        while not any(event[0] == "step" and event[8] for event in events):
            message = await anext(messages)
            assert message["kind"] == "events"
            events += message["events"]
        assert (await task).status == 200
    assert events[0][0] == "arrival"
    steps = [event[2] for event in events if event[0] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert steps[-1] >= 9
    assert not re.search(rb"secret|launch", orjson.dumps(events))


async def test_whoever_comes_late_begins_between_two_events(serve):
    """With steps in flight: what they bring is not told twice."""
    runner = ScriptRunner("abc", by_hand=True, depth=2)
    server = await serve(runner=runner)
    task = asyncio.create_task(server.complete("x" * 40, max_tokens=30, ignore_eos=True))
    await server.until(lambda: runner.num_held)
    runner.finish_step()
    await server.until(lambda: runner.num_held == 2)
    async with watching(server) as messages:
        begin = await anext(messages)
        (seq,) = begin["standing"]["sequences"]
        assert (seq["num_computed"], len(seq["tables"][0])) == (40, 3)
        await server.finish(task)
        steps: list[Any] = []
        while not any(step[8] for step in steps):  # until one says that it has ended
            steps += [e for e in (await anext(messages))["events"] if e[0] == "step"]
        added = [block for step in steps for work in step[5] for block in work[5][0]]
        assert len(set(added)) == len(added)
        assert not set(added) & set(seq["tables"][0])
        assert len(seq["tables"][0]) + len(added) == -(-69 // 16)


async def test_a_reader_that_is_behind_begins_anew(serve, monkeypatch):
    monkeypatch.setattr("ruvon.server.watch.MOST_EVENTS", 3)
    server = await serve("Hello")
    async with watching(server) as messages:
        await anext(messages)
        await server.complete("Hi", max_tokens=30, ignore_eos=True)
        message = await anext(messages)
        while message["kind"] != "begin":
            message = await anext(messages)
        assert message["missed"] > 3


async def test_there_is_an_end_to_watchers(serve, monkeypatch):
    monkeypatch.setattr("ruvon.server.watch.MOST_WATCHERS", 1)
    server = await serve("Hello")
    async with watching(server) as messages:
        await anext(messages)
        assert (await server.get("/debug/live")).status == 503
    await server.until(lambda: not server.app[WATCHERS])
    async with watching(server) as messages:
        await anext(messages)


async def test_slow_motion_needs_to_be_allowed(serve):
    server = await serve("Hello")
    reply = await server.post("/debug/gate", {"pace": 1})
    assert (reply.status, reply.error["code"]) == (400, "not_allowed")
    assert "--ui-step-gate" in reply.error["message"]


async def test_steps_go_one_by_one_through_a_gate(serve):
    server = await serve("Hello", server=GATED)
    recorder = server.service.generator.observer.recorder
    assert (await server.post("/debug/gate", {"pace": 600})).json == {"pace": 600}
    assert (await server.post("/debug/gate", {"pace": -1})).error["param"] == "pace"
    assert (await server.post("/debug/gate", {"step": True})).status == 200
    task = asyncio.create_task(server.post("/v1/completions", LONG))
    await server.until(lambda: recorder.end == 2)  # it came, and a step
    for end in (3, 4):
        await server.post("/debug/gate", {"step": True})
        await server.until(lambda end=end: recorder.end == end)
    await asyncio.sleep(0)
    assert recorder.end == 4
    assert (await server.post("/debug/gate", {"pace": 0})).json == {"pace": 0}
    assert (await task).status == 200
    server.assert_idle()


async def test_a_gate_that_nobody_asks_for_any_more_opens(serve, monkeypatch):
    monkeypatch.setattr("ruvon.server.watch.LEASE", 0.05)
    server = await serve("Hello", server=GATED)
    await server.post("/debug/gate", {"pace": 600})
    assert (await server.post("/v1/completions", LONG)).status == 200


async def test_a_held_engine_is_not_stuck_and_ends_in_order(serve):
    server = await serve("Hello", server=GATED)
    await server.post("/debug/gate", {"pace": 600})
    task = asyncio.create_task(server.post("/v1/completions", LONG))
    await server.until(lambda: server.num_live)
    before = server.service.generator.progressed_at
    await server.until(lambda: server.service.generator.progressed_at > before)
    await server.service.generator.stop(5)
    assert (await task).status == 200


async def test_a_short_prompt_is_looked_into(serve):
    server = await serve("Hello", numbers={"lens": FakeLens()})
    reply = await server.post("/debug/attention", {"prompt": "abc"})
    told = reply.json
    assert (reply.status, told["num_layers"], told["num_heads"]) == (200, 3, 2)
    assert [row[0][0] for row in told["top_ids"]] == [told["tokens"][0]] * 4
    weights = base64.b64decode(told["attention"])
    assert weights == bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]) * 6
    reply = await (await serve("Hello")).post("/debug/attention", {"prompt": "abc"})
    assert (reply.status, reply.error["message"]) == (400, "This model cannot be looked into.")
