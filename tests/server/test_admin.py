"""What a server says of itself."""

from __future__ import annotations

import asyncio

from serving import ScriptRunner

from ruvon import __version__
from ruvon.config import ServerConfig


async def test_models_list_and_single_with_slashes(serve):
    server = await serve(server=ServerConfig(port=0, served_model_name="org/a, alias, org/a"))
    listed = (await server.get("/v1/models")).json
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["org/a", "alias"]
    card = (await server.get("/v1/models/org/a")).json
    assert card == listed["data"][0]
    assert card["created"] > 1_700_000_000
    del card["created"]
    assert card == {
        "id": "org/a",
        "object": "model",
        "owned_by": "ruvon",
        "root": "org/fake",
        "parent": None,
        "max_model_len": 512,
        "default_sampling": {},
    }
    assert (await server.chat(model="alias")).json["model"] == "alias"
    assert (await server.chat()).json["model"] == "org/a"
    missing = await server.get("/v1/models/org/fake")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


async def test_version_and_health(serve):
    server = await serve()
    assert (await server.get("/version")).json == {"version": __version__}
    for path in ("/health", "/live", "/ready"):
        reply = await server.get(path)
        assert reply.status == 200
        assert reply.headers["Server"] == "ruvon"


async def test_a_stuck_step_is_not_alive(serve):
    server = await serve(runner=ScriptRunner("x", by_hand=True))
    task = asyncio.create_task(server.chat())
    await server.until(lambda: server.fake.num_held)
    assert (await server.get("/live")).status == 200
    server.service.generator.progressed_at -= 1000
    stuck = await server.get("/live")
    assert (stuck.status, stuck.json) == (503, {"status": "stuck"})
    await server.finish(task)
    assert (await server.get("/live")).status == 200


async def test_tokenize_and_back(serve):
    server = await serve()
    reply = await server.post("/tokenize", {"prompt": "Hé", "return_token_strs": True})
    assert reply.json == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [72, 0xC3, 0xA9],
        "token_strs": ["H", "�", "�"],
    }
    back = await server.post("/detokenize", {"tokens": reply.json["tokens"] + [259]})
    assert back.json == {"prompt": "Hé<|im_end|>"}
    back = await server.post("/detokenize", {"tokens": [72, 259], "return_token_strs": True})
    assert back.json == {"prompt": "H<|im_end|>", "token_strs": ["H", "<|im_end|>"]}


async def test_tokenizer_info(serve):
    server = await serve()
    info = (await server.get("/tokenizer_info")).json
    assert (info["bos_token"], info["eos_token"]) == ("<bos>", "<eos>")
    assert "<|im_start|>" in info["chat_template"]


async def test_tokenize_messages_as_chat_does(serve):
    server = await serve()
    messages = [{"role": "user", "content": "Hi"}]
    tokens = (await server.post("/tokenize", {"messages": messages})).json["tokens"]
    chat = await server.chat("Hi", return_token_ids=True)
    assert tokens == chat.json["prompt_token_ids"]
    bare = {"messages": messages, "add_generation_prompt": False}
    assert len((await server.post("/tokenize", bare)).json["tokens"]) < len(tokens)


async def test_tokenize_errors(serve):
    server = await serve()
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "nonsense": 1}, "nonsense"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "model": "x"}, "model"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ):
        reply = await server.post(path, body)
        assert reply.status in (400, 404)
        assert reply.error["param"] == param


async def test_metrics_count_what_was_done(serve):
    server = await serve("Hello")
    await server.chat("Hi")
    await server.chat("Hi", stream=True, n=2)
    reply = await server.get("/metrics")
    assert reply.headers["Content-Type"].startswith("text/plain; version=")
    lines = dict(line.rsplit(" ", 1) for line in reply.body.decode().splitlines())
    base = '{engine="0",model_name="org/fake"}'
    assert lines[f"vllm:generation_tokens_total{base}"] == "18.0"
    assert lines[f"vllm:time_to_first_token_seconds_count{base}"] == "3.0"
    assert lines[f"vllm:inter_token_latency_seconds_count{base}"] == "15.0"
    assert lines[f"vllm:num_requests_running{base}"] == "0.0"
    assert lines[f"ruvon_generation_tokens_total{base}"] == "18.0"
    assert f"vllm:prompt_tokens_total{base}" in lines
    handler = 'handler="/v1/chat/completions",method="POST",status="200"'
    assert lines[f"http_requests_total{{{handler}}}"] == "2.0"


async def test_gauges_are_right_between_steps(serve):
    server = await serve(runner=ScriptRunner("x" * 99, by_hand=True), max_num_seqs=1)
    tasks = [asyncio.create_task(server.chat()) for _ in range(2)]
    await server.until(lambda: server.fake.num_held and server.num_live == 2)
    base = '{engine="0",model_name="org/fake"}'

    async def gauges():
        text = (await server.get("/metrics")).body.decode()
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines())
        return tuple(
            float(lines[f"vllm:{name}{base}"])
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        )

    running, waiting, usage = await gauges()
    assert (running, waiting) == (1, 1)
    assert usage > 0
    for task in tasks:
        task.cancel()
    await server.until(lambda: not server.num_live)
    server.fake.finish_step()
    await server.until(lambda: server.idle)
    assert await gauges() == (0, 0, 0)
