"""Why a request took so long: to its client, to nobody else, in bounded memory."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from serving import ScriptRunner
from structlog.testing import capture_logs

from ruvon.config import ServerConfig
from ruvon.server.explain import sentence, so_far, spell
from ruvon.server.work import Requests
from ruvon.telemetry.finished import Finished

KEYED = ServerConfig(port=0, api_key=("one", "two"), admin_key=("boss",))


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


async def explained(server, name, **options):
    return await server.get(f"/v1/requests/{name}/explain", **options)


async def test_both_ids_of_a_request_are_its_names(serve):
    server = await serve("Hello")
    reply = await server.chat("Hi", request_id="mine/1")
    for name in ("mine/1", reply.json["id"]):
        told = (await explained(server, name)).json
        assert told["id"] == name
        assert told["status"] == "finished"
        assert (told["prompt_tokens"], told["output_tokens"]) == (21, 6)
        assert (told["prompt_steps"], told["completions"], told["finish_reason"]) == (1, 1, "stop")
        seconds = told["seconds"]
        assert seconds["total"] == pytest.approx(
            seconds["queue"] + seconds["prefill"] + seconds["decode"], abs=1e-5
        )
        assert "for a prompt of 21 tokens in 1 step; " in told["explanation"]


@pytest.mark.parametrize(
    "path", ["/v1/messages", "/v1/responses", "/api/generate", "/v1/embeddings"]
)
async def test_every_api_has_an_explanation(serve, path):
    server = await serve("Hello")
    body = {
        "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9},
        "/v1/responses": {"input": "Hi"},
        "/api/generate": {"prompt": "Hi", "stream": False},
        "/v1/embeddings": {"input": ["Hi", "there"]},
    }[path]
    reply = await server.post(path, body)
    assert reply.status == 200
    told = (await explained(server, reply.headers["X-Request-Id"])).json
    assert told["status"] == "finished"
    assert told["completions"] == (2 if path == "/v1/embeddings" else 1)


async def test_who_waits_is_told_for_what(serve, capsys):
    server = await serve(runner=ScriptRunner("x", by_hand=True), max_num_seqs=1)
    first = asyncio.create_task(server.chat(request_id="first"))
    await server.until(lambda: server.fake.num_held)
    second = asyncio.create_task(server.chat(request_id="second"))
    await server.until(lambda: server.num_live == 2)
    told = (await explained(server, "second")).json
    assert told["status"] == "queued"
    assert "now behind 0 others" in told["explanation"]
    told = (await explained(server, "first")).json
    assert (told["status"], "0 of the 21 tokens" in told["explanation"]) == ("running", False)
    await server.finish(first, second)
    told = (await explained(server, "second")).json
    assert told["started_before"] == 0
    assert set(told["waited_for"]) == {"places"}
    assert "for a place among those that run" in told["explanation"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "chatcmpl-" in line]
    assert ["waited_for=places" in line for line in lines] == [False, True]


async def test_a_response_in_the_background_is_told_when_it_is_over(serve):
    with capture_logs() as logs:
        server = await serve("Hello")
        begun = (await server.post("/v1/responses", {"input": "Hi", "background": True})).json
        await server.until(lambda: any(each["event"] == "background_response" for each in logs))
    line = next(each for each in logs if each["event"] == "background_response")
    assert (line["id"], line["finish"]) == (begun["id"], "stop")
    assert line["decode_ms"] > 0
    assert (await explained(server, begun["id"])).json["output_tokens"] == line["output_tokens"]


async def test_a_request_is_its_keys_and_the_admins(serve):
    server = await serve("Hello", server=KEYED)
    body = {"prompt": "Hi", "request_id": "r"}
    await server.post("/v1/completions", body, headers=bearer("one"))
    assert (await explained(server, "r", headers=bearer("one"))).status == 200
    assert (await explained(server, "r", headers=bearer("boss"))).status == 200
    for reply in (
        await explained(server, "r", headers=bearer("two")),
        await explained(server, "other", headers=bearer("one")),
    ):
        assert (reply.status, reply.error["code"]) == (404, "request_not_found")
    assert (await explained(server, "r")).status == 401


def stream(*seq_ids):
    return SimpleNamespace(open=set(seq_ids), finished=[])


def test_what_is_remembered_is_bounded():
    requests = Requests(most=10)
    for number in range(100):
        requests.remember("t", (f"r{number}", ""), [stream(1, 2, 3)])
    kept = [n for n in range(100) if requests.find(f"r{n}", "t")]
    assert kept == [97, 98, 99]
    assert len(requests._named) == 3
    requests.remember("t", ("large",), [stream(*range(500))])  # of one there is always room
    assert requests.find("large", "t")
    assert not requests.find("r99", "t")


def test_the_latest_of_a_name_counts_and_outlives_the_others():
    requests = Requests(most=2)
    first, second = [stream(1)], [stream(1)]
    requests.remember("t", ("same",), first)
    requests.remember("t", ("same",), second)
    requests.remember("u", ("other",), [stream(1)])
    assert requests.find("same", "t").streams is second
    assert requests.find("same", "u") is None
    assert requests.find("same", None).streams is second


def test_a_request_of_several_parts_is_one():
    requests, parts = Requests(), [stream(1)]
    requests.remember("t", ("r",), parts)
    parts.append(stream(2))
    requests.remember("t", ("r",), parts)
    assert len(requests._order) == 1


LONG = Finished(
    reason="stop", num_prompt=2048, num_output=51, num_cached=1024, max_tokens=100, n=1,
    arrived_at=0.0, queue=2.9, prefill=0.8, decode=0.5, num_before=12, num_chunks=4,
    num_preempted=1, waits={"step": 0.001, "blocks": 0.3, "places": 2.599},
)  # fmt: skip


def test_the_sentence():
    assert sentence(LONG, 1) == (
        "It took 4.20 s: 2.90 s in the queue behind 12 others (2.60 s for a place among those that"
        " run, 300 ms for room in the KV cache); 800 ms for a prompt of 2,048 tokens, 1,024 of them"
        " cached, in 4 steps; 500 ms for 50 tokens after the first (100.0 a second); it had to make"
        " room 1 time, and to begin again."
    )


def test_the_sentence_of_one_that_never_ran():
    never = Finished("deadline", 9, 0, 0, 5, 3, 0.0, queue=1.5, prefill=0.0, decode=0.0)
    assert sentence(never, 3) == (
        "It took 1.50 s until its time was up, as the last of 3 completions: 1.50 s in the queue."
    )


def test_what_is_said_meanwhile():
    assert so_far("queued 1", 2.0) == "It has been queued for 2.00 s, now behind 1 other."
    said = so_far("prefill 512/4096", 0.25)
    assert said == "250 ms after it came, 512 of the 4096 tokens of its prompt are computed."
    assert so_far("", 0.0123) == "It is being answered, and came 12.3 ms ago."


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.9994, "999 ms"), (0.9996, "1.00 s"), (1e-5, "0.01 ms")]
)
def test_times_in_words(seconds, said):
    assert spell(seconds) == said


# ----------------------------------------------------------------------- timings


async def test_timings_on_demand_and_only_then(serve):
    server = await serve("Hello")
    assert "timings" not in (await server.chat("Hi")).json
    for reply in (await server.chat("Hi", timings=True), await server.complete(timings=True)):
        times = reply.json["timings"]
        assert times["predicted_n"] == 6
        assert times["cache_n"] + times["prompt_n"] == reply.json["usage"]["prompt_tokens"]
        assert times["total_ms"] == pytest.approx(
            times["queue_ms"] + times["prompt_ms"] + times["predicted_ms"], abs=0.01
        )
        assert times["predicted_per_second"] == pytest.approx(
            5000 / times["predicted_ms"], rel=0.01
        )


@pytest.mark.parametrize("options", [None, {"include_usage": True}])
async def test_timings_of_a_stream_come_last(serve, options):
    server = await serve("Hello, you")
    told = {} if options is None else {"stream_options": options}
    events = (await server.chat(stream=True, timings=True, stop="you", **told)).events
    *others, last = events
    assert last["choices"] == []
    assert last["timings"]["predicted_n"] == 10
    assert ("usage" in last) == (options is not None)
    assert not any("timings" in event for event in others)
