"""Requests on their way to a replica and back, over real sockets."""

from __future__ import annotations

import asyncio
import gzip

import pytest
from aiohttp.http_parser import DeflateBuffer
from serving import ScriptRunner, texts

BOMB = gzip.compress(b'{"prompt": "' + bytes(1 << 20))


async def test_an_answer_passes_through_as_it_is(route):
    router = await route(1)
    direct = await router.replicas[0].chat("Hi", seed=1)
    through = await router.chat("Hi", seed=1)
    assert through.status == direct.status == 200
    assert through.json["choices"] == direct.json["choices"]
    assert through.json["usage"]["prompt_tokens"] == direct.json["usage"]["prompt_tokens"]
    assert through.headers["Content-Type"] == direct.headers["Content-Type"]


async def test_a_stream_passes_through_as_it_is(route):
    router = await route(2, "one two three")
    reply = await router.chat("Hi", stream=True)
    assert texts(reply.events) == {0: "one two three"}
    assert reply.headers["Transfer-Encoding"] == "chunked"
    again = await router.get("/v1/models")  # the same connection is still of use
    assert again.json["data"][0]["id"] == "org/fake"


async def test_errors_are_the_replicas(route):
    router = await route(2)
    wrong = await router.post("/v1/chat/completions", {"messages": 7})
    assert wrong.status == 400
    assert wrong.error["param"] == "messages"
    missing = await router.get("/nowhere")
    assert missing.status == 404


async def test_a_compressed_body_is_refused_before_anybody_inflates_it(route, monkeypatch):
    monkeypatch.setattr(DeflateBuffer, "__init__", lambda *given: pytest.fail("decompressed"))
    router = await route(1)
    for path in ("/v1/completions", "/v1/messages", "/anything"):
        reply = await router.post(path, BOMB, headers={"Content-Encoding": "gzip"})
        assert reply.status == 415, path
    samples = await router.metrics()
    assert not any("ruvon_router_choices_total" in name for name, count in samples.items() if count)


async def test_a_conversation_stays_where_its_beginning_is(route):
    router = await route(3, options=[{"numbers": {"max_model_len": 4000}}] * 3)
    history = [{"role": "user", "content": "x" * 3000}]
    replies = []
    for turn in range(4):
        reply = await router.post("/v1/chat/completions", {"messages": history, "max_tokens": 4})
        replies.append(reply.json)
        history += [reply.json["choices"][0]["message"], {"role": "user", "content": f"{turn}" * 9}]
    cached = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]
    assert cached[0] == 0
    assert all(count > 2500 for count in cached[1:])
    samples = await router.metrics()
    assert samples["ruvon_router_cached_tokens_total"] == sum(cached)
    promised = samples["ruvon_router_promised_tokens_total"]
    assert 0.8 * sum(cached) < promised < 1.2 * sum(cached)


async def test_metrics_are_those_of_all(route):
    router = await route(2)
    for text in ("one", "two"):  # who has equally little to do takes turns
        await router.complete(text)
    samples = await router.metrics()
    assert samples['vllm:prompt_tokens_total{engine="0",model_name="org/fake"}'] == 6
    running = 'vllm:num_requests_running{engine="0",model_name="org/fake",replica="%s"}'
    assert {samples[running % name] for name in "01"} == {0.0}
    assert samples['ruvon_router_choices_total{reason="load",replica="0"}'] == 1
    assert samples['ruvon_router_choices_total{reason="load",replica="1"}'] == 1


async def test_a_client_that_leaves_frees_its_replica(route):
    runner = ScriptRunner("x" * 400, by_hand=True)
    router = await route(1, options=[{"runner": runner}])
    server = router.replicas[0]
    body = {"prompt": "Hi", "stream": True, "max_tokens": 300}
    request = router.session.post(router.url + "/v1/completions", json=body)
    task = asyncio.create_task(request.__aenter__())
    await router.until(lambda: runner.num_held)
    runner.finish_step()
    response = await task
    await response.content.readany()
    response.close()
    await router.until(lambda: not server.num_live)
    assert router.fleet.in_flight == 0


async def test_who_is_lost_before_it_answers_leaves_its_requests_to_others(route):
    slow = ScriptRunner("never said", by_hand=True)
    router = await route(2, "said", options=[{"runner": slow}, {}])
    router.fleet.replicas[1].held_back = True
    asked = [asyncio.create_task(router.chat("Hi", stream=bool(i % 2))) for i in range(4)]
    await router.until(lambda: router.replicas[0].num_live == 4)
    router.fleet.replicas[1].held_back = False
    await router.lose(0)
    replies = await asyncio.gather(*asked)
    assert [reply.status for reply in replies] == [200] * 4
    assert all(b"said" in reply.body and b"never" not in reply.body for reply in replies[::2])
    assert texts(replies[1].events) == {0: "said"}


async def test_who_is_lost_in_midstream_is_told_of(route):
    slow = ScriptRunner("half of it", by_hand=True)
    router = await route(1, options=[{"runner": slow}])
    body = {"prompt": "Hi", "stream": True}
    request = router.session.post(router.url + "/v1/completions", json=body)
    task = asyncio.create_task(request.__aenter__())
    await router.until(lambda: slow.num_held)
    slow.finish_step()
    response = await task
    data = await response.content.readuntil(b"\n\n")
    await router.lose(0)
    data += await response.read()
    assert b'"text":"h"' in data
    assert b'"code":"replica_lost"' in data
    assert (await router.chat("Hi")).status == 503


async def test_who_is_full_leaves_its_requests_to_others(route):
    busy = ScriptRunner("busy", by_hand=True)
    options = [{"runner": busy, "max_num_seqs": 1, "max_num_queued_reqs": 1}, {}]
    router = await route(2, "free", options=options, max_imbalance=100)
    prompt = "p" * 300
    router.fleet.replicas[1].held_back = True
    first = [asyncio.create_task(router.complete(prompt)) for _ in range(2)]
    await router.until(lambda: router.replicas[0].num_live == 2)
    refused = await router.complete(prompt)
    assert refused.status == 503
    assert refused.error["code"] == "queue_full"
    assert int(refused.headers["Retry-After"]) >= 1
    router.fleet.replicas[1].held_back = False
    reply = await router.complete(prompt)  # its prefix is at the one that is full
    assert reply.json["choices"][0]["text"] == "free"
    await router.replicas[0].finish(*first)


async def test_keys_are_asked_for_at_the_door(route):
    router = await route(2, key="secret")
    assert (await router.chat("Hi")).status == 401
    reply = await router.chat("Hi")
    assert reply.status == 401
    auth = {"Authorization": "Bearer secret"}
    messages = [{"role": "user", "content": "Hi"}]
    reply = await router.post("/v1/chat/completions", {"messages": messages}, headers=auth)
    assert reply.status == 200
    assert (await router.get("/ready")).json["ready"] == 2
    assert (await router.get("/metrics")).status == 401


async def test_stored_responses_are_found_where_they_are(route):
    router = await route(3)
    first = (await router.post("/v1/responses", {"input": "Hi", "store": True})).json
    for _ in range(5):  # others go elsewhere
        await router.chat("Hi")
    body = {"input": "And?", "previous_response_id": first["id"]}
    assert (await router.post("/v1/responses", body)).json["previous_response_id"] == first["id"]
    router.fleet.holders.__init__()  # as after a restart of the router
    assert (await router.get(f"/v1/responses/{first['id']}")).json["id"] == first["id"]
    assert (await router.post("/v1/responses", body)).status == 200
    unknown = await router.get("/v1/responses/resp_unknown")
    assert unknown.status == 404
    assert unknown.error["code"] == "response_not_found"


async def test_past_requests_are_explained_by_whoever_answered_them(route):
    router = await route(3)
    for name in ("one", "two/2", "three"):
        await router.chat("Hi", request_id=name)
    for name in ("one", "two/2", "three"):
        told = await router.get(f"/v1/requests/{name}/explain")
        assert (told.json["id"], told.json["status"]) == (name, "finished")
    unknown = await router.get("/v1/requests/four/explain")
    assert (unknown.status, unknown.error["code"]) == (404, "request_not_found")


async def test_a_dropped_stream_is_gone_on_with_where_it_is(route):
    slow = ScriptRunner("abcdefgh", by_hand=True)
    router = await route(2, "other", options=[{"runner": slow}, {}])
    body = {"prompt": "Hi", "stream": True, "max_tokens": 8}
    headers = {"X-Ruvon-Resume": "true"}
    task = asyncio.create_task(
        router.session.post(router.url + "/v1/completions", json=body, headers=headers)
    )
    await router.until(lambda: slow.num_held)
    slow.finish_step()
    response = await task
    data = b""
    while b"id: " not in data:
        data += await response.content.readany()
    response.close()
    last = data.partition(b"id: ")[2].partition(b"\n")[0].decode()
    await router.until(lambda: router.fleet.in_flight == 0)
    again = asyncio.create_task(
        router.post("/v1/completions", body, headers={"Last-Event-ID": last})
    )
    await router.replicas[0].finish(again)
    assert b'"text":"h"' in again.result().body


async def test_a_router_without_replicas_asks_for_patience(route):
    router = await route(1)
    await router.lose(0)
    await router.until(lambda: router.fleet.num_open == 0)
    reply = await router.chat("Hi")
    assert reply.status == 503
    assert reply.headers["Retry-After"] == "1"
    assert (await router.get("/ready")).status == 503
    assert (await router.get("/live")).status == 200
