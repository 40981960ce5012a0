"""Traces and recordings of a server, and `ruvon replay` of what it gave."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner
from serving import Reply, Server

from ruvon.cli import main
from ruvon.config import ServerConfig

ADMIN = ServerConfig(port=0, admin_key=("boss",))
KEY = {"Authorization": "Bearer boss"}
SECRET = "the launch code is 0451"


async def recorded(server: Server, query: str, requests: int = 6) -> Reply:
    """A recording that begins while answers run and ends after others have begun."""
    body = {"prompt": SECRET, "max_tokens": 40, "ignore_eos": True}
    first = [asyncio.create_task(server.post("/v1/completions", body)) for _ in range(requests)]
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    recording = asyncio.create_task(server.get(f"/debug/recording?{query}", headers=KEY))
    while not recording.done():
        await server.post("/v1/completions", body)
    for task in first:
        assert (await task).status == 200
    return await recording


@pytest.mark.parametrize("contents", [0, 1])
async def test_a_recording_comes_out_the_same_again(serve, tmp_path: Path, contents):
    server = await serve("Hello", server=ADMIN, max_num_seqs=4)
    reply = await recorded(server, f"steps=60&contents={contents}")
    assert reply.status == 200
    lines = [orjson.loads(line) for line in reply.body.splitlines()]
    kinds = [line.get("kind", "header") for line in lines]
    assert kinds[:2] == ["header", "begin"]
    assert kinds.count("plan") == 60
    added = next(line for line in lines if line.get("kind") == "add")
    said = bytes(token for token in added["tokens"] if token < 256)
    assert said.startswith(SECRET.encode()) if contents else not added["tokens"]

    path = tmp_path / "recording.jsonl"
    path.write_bytes(reply.body)
    done = CliRunner().invoke(main, ["replay", str(path)])
    assert done.exit_code == 0, done.output
    assert "60 steps, each as it was" in done.output


async def test_a_schedule_that_comes_out_differently_is_told(serve, tmp_path: Path):
    server = await serve("Hello", server=ADMIN)
    reply = await recorded(server, "steps=30")
    path = tmp_path / "recording.jsonl"
    lines = reply.body.splitlines()
    at = max(n for n, line in enumerate(lines) if b'"kind":"plan"' in line)
    lines[at] = re.sub(rb'"chunks":\[\[(\d+),', rb'"chunks":[[9\1,', lines[at])
    path.write_bytes(b"\n".join(lines))
    done = CliRunner().invoke(main, ["replay", str(path)])
    assert done.exit_code == 1
    assert "differs: chunk 0 was (9" in done.output


async def test_a_trace_has_every_step_and_sequence(serve):
    server = await serve("Hello", server=ADMIN)
    await server.post("/v1/completions", {"prompt": "Hi", "n": 2})
    reply = await server.get("/debug/trace", headers=KEY)
    names = [entry["name"] for entry in reply.json["traceEvents"]]
    assert names.count("step 1") == 1
    assert {"sequence 0", "sequence 1", "queued", "decode"} <= {*names}


@pytest.mark.parametrize("query", ["steps=0", "steps=many", "seconds=-1", "seconds=1e9"])
async def test_what_makes_no_recording_is_named(serve, query):
    server = await serve("Hello", server=ADMIN)
    reply = await server.get(f"/debug/recording?{query}", headers=KEY)
    assert reply.status == 400
    assert reply.error["param"] == query.partition("=")[0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no recording"),
        ("{}", "line 1"),
        ('{"format":1', "line 1"),
        ("[1]\n", "line 1"),
    ],
)
def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, text, told):
    path = tmp_path / "recording.jsonl"
    path.write_text(text)
    done = CliRunner().invoke(main, ["replay", str(path)])
    assert done.exit_code == 1
    assert told in done.output


async def test_the_last_steps_and_those_behind_them(serve):
    server = await serve("Hello", server=ADMIN)
    await server.post("/v1/completions", {"prompt": "Hi there", "n": 2})
    first = (await server.get("/debug/steps?limit=3", headers=KEY)).json
    assert [step["step"] for step in first["steps"]] == [4, 5, 6]  # Hello and its end
    last = first["steps"][-1]
    assert last["sampled"] == [0, 1]
    assert last["finished"] == [{"sequence": n, "reason": "stop"} for n in (0, 1)]
    assert last["stats"]["num_running"] == 0
    await server.post("/v1/completions", {"prompt": "Ho"})
    since = first["next"]
    news = (await server.get(f"/debug/steps?since={since}&limit=2", headers=KEY)).json
    assert [step["step"] for step in news["steps"]] == [7, 8]
    assert news["steps"][0]["chunks"] == [{"sequence": 2, "start": 0, "tokens": 2}]
    assert news["steps"][0]["started"] == [{"sequence": 2, "cached": 0}]
    rest = (await server.get(f"/debug/steps?since={news['next']}", headers=KEY)).json
    assert [step["step"] for step in rest["steps"]] == [9, 10, 11, 12]
    assert (await server.get(f"/debug/steps?since={rest['next']}", headers=KEY)).json["steps"] == []


@pytest.mark.parametrize("query", ["limit=0", "limit=1e9", "since=-1", "since=x"])
async def test_what_asks_for_no_steps_is_named(serve, query):
    server = await serve("Hello", server=ADMIN)
    reply = await server.get(f"/debug/steps?{query}", headers=KEY)
    assert (reply.status, reply.error["param"]) == (400, query.partition("=")[0])
