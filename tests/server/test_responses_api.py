"""The Responses API over a live server, through the official client where it has a word for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import openai
import pytest
from response_events import check_response, check_stream, parse_events
from serving import ScriptRunner, Server

from ruvon.config import ServerConfig
from ruvon.server.responses_api.store import RESPONSES

PATH = "/v1/responses"


def client(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def echo(prompt: str) -> str:
    """What the conversation was, as the model read it."""
    return prompt.removesuffix("<|im_start|>assistant\n")


async def ask(server: Server, input: Any = "Hi", **fields: Any) -> Any:
    reply = await server.post(PATH, {"input": input, **fields})
    assert reply.status == 200, reply.body
    check_response(reply.json)
    return reply.json


async def ask_events(server: Server, input: Any = "Hi", **fields: Any) -> list[dict[str, Any]]:
    reply = await server.post(PATH, {"input": input, "stream": True, **fields})
    assert reply.status == 200, reply.body
    events = parse_events(reply.body)
    check_stream(events)
    return events


def text(response: Any) -> str:
    return response["output"][-1]["content"][0]["text"]


# ---------------------------------------------------------------------- the official client


async def test_the_official_client(serve):
    server = await serve("Hello")
    async with client(server) as ask:
        made = await ask.responses.create(model="org/fake", input="Hi", metadata={"a": "b"})
        assert (made.output_text, made.status) == ("Hello", "completed")
        assert made.usage.input_tokens_details.cached_tokens == 0
        assert (made.usage.output_tokens, made.metadata) == (6, {"a": "b"})
        assert await ask.responses.retrieve(made.id) == made
        items = [item async for item in ask.responses.input_items.list(made.id)]
        assert [(item.role, item.content[0].text) for item in items] == [("user", "Hi")]
        counted = await ask.responses.input_tokens.count(model="org/fake", input="Hi")
        assert counted.input_tokens == made.usage.input_tokens
        await ask.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError) as gone:
            await ask.responses.retrieve(made.id)
        assert gone.value.code == "response_not_found"


async def test_its_streams_and_the_helper_that_puts_them_together(serve):
    server = await serve("Hello")
    async with client(server) as ask:
        stream = await ask.responses.create(model="org/fake", input="Hi", stream=True)
        events = [event async for event in stream]
        deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
        assert "".join(deltas) == "Hello"
        assert events[-1].response.output_text == "Hello"
        async with ask.responses.stream(model="org/fake", input="Hi") as helper:
            final = await helper.get_final_response()
        assert final.output_text == "Hello"
        kept = await ask.responses.retrieve(final.id)
        assert kept.output[0].id == final.output[0].id
        again = await ask.responses.retrieve(events[0].response.id, stream=True)
        assert [e.to_dict() async for e in again] == [e.to_dict() for e in events]
        tail = await ask.responses.retrieve(
            events[0].response.id, stream=True, starting_after=events[-3].sequence_number
        )
        assert [e.to_dict() async for e in tail] == [e.to_dict() for e in events[-2:]]
        all_of_it = await ask.responses.retrieve(
            events[0].response.id, stream=True, starting_after=-9
        )
        assert [e.to_dict() async for e in all_of_it] == [e.to_dict() for e in events]


async def test_answers_feed_back_as_input(serve):
    """An output item, dumped with all its fields, is an item of the next request."""
    server = await serve("Hello")
    async with client(server) as ask:
        made = await ask.responses.create(model="org/fake", input="Hi", include=[])
        history = [{"role": "user", "content": "Hi"}, *(i.model_dump() for i in made.output)]
        raw = await ask.responses.with_raw_response.create(
            model="org/fake", input=[*history, {"role": "user", "content": "More"}]
        )
        assert "x-ruvon-ignored" not in raw.headers
        assert raw.parse().output_text == "Hello"


async def test_errors_are_the_clients_own_classes(serve):
    server = await serve(numbers={"max_model_len": 64})
    async with client(server) as ask:
        with pytest.raises(openai.NotFoundError):
            await ask.responses.create(model="gpt-4o", input="Hi")
        with pytest.raises(openai.BadRequestError) as long:
            await ask.responses.create(model="org/fake", input="x" * 100)
        assert (long.value.code, long.value.param) == ("context_length_exceeded", "input")
        with pytest.raises(openai.BadRequestError) as unknown:
            await ask.responses.create(
                model="org/fake", input="Hi", previous_response_id="resp_none"
            )
        assert unknown.value.code == "previous_response_not_found"


class Fails(ScriptRunner):
    """Says two letters, and then has none to say."""

    def _draw(self, row: Any, context: Any) -> Any:
        if len(row.history) > row.num_prompt + 2:
            self.errors[row.seq_id] = "NaN in the logits"
        return super()._draw(row, context)


async def until_error(stream: Any, what: str) -> AsyncIterator[Any]:
    """The events of a stream that must fail."""
    with pytest.raises(openai.APIError, match=what):  # noqa: PT012
        async for event in stream:
            yield event


async def test_a_failure_in_mid_stream_is_raised_and_kept(serve):
    server = await serve(runner=Fails("Hello"))
    async with client(server) as ask:
        stream = await ask.responses.create(model="org/fake", input="Hi", stream=True)
        events = [event async for event in until_error(stream, "NaN in the logits")]
        assert events[-1].type == "response.failed"
        kept = await ask.responses.retrieve(events[-1].response.id)
        assert (kept.status, kept.error.code) == ("failed", "server_error")
        with pytest.raises(openai.InternalServerError):
            await ask.responses.create(model="org/fake", input="Hi")


# ---------------------------------------------------------------------- conversations


async def test_a_conversation_goes_on_by_id(serve):
    server = await serve(echo)
    first = await ask(server, "one", instructions="Be brief.")
    assert "Be brief." in text(first)
    second = await ask(server, "two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    assert "Be brief." not in text(second).split("one")[0]
    assert text(second).count("one") == 2  # as it was said, and as it was said again
    listed = (await server.get(f"{PATH}/{second['id']}/input_items?order=asc")).json
    assert [item["role"] for item in listed["data"]] == ["user", "assistant", "user"]
    assert listed["data"][1]["id"] == first["output"][0]["id"]
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    third = await ask(server, [reference, {"role": "user", "content": "three"}])
    assert text(first) in text(third)


async def test_nobody_finds_what_another_key_has_asked_for(serve):
    server = await serve("Hello", server=ServerConfig(port=0, api_key=("mine", "yours")))

    def keyed(key: str) -> openai.AsyncOpenAI:
        return client(server).with_options(api_key=key)

    async with keyed("mine") as mine, keyed("yours") as yours:
        made = await mine.responses.create(model="org/fake", input="Hi")
        later: dict[str, Any] = {"model": "org/fake", "previous_response_id": made.id}
        item = {"type": "item_reference", "id": made.output[0].id}
        again = await mine.responses.create(input=[item], **later)
        assert (await mine.responses.retrieve(again.id)).status == "completed"
        for attempt in (yours.responses.retrieve, yours.responses.delete):
            with pytest.raises(openai.NotFoundError):
                await attempt(made.id)
        with pytest.raises(openai.BadRequestError):
            await yours.responses.create(input="Hi", **later)
        with pytest.raises(openai.BadRequestError):
            await yours.responses.create(model="org/fake", input=[item])


async def test_items_are_listed_in_pages(serve):
    server = await serve("Hello")
    items = [{"role": "user", "content": str(n), "id": f"msg_{n}"} for n in range(5)]
    made = await ask(server, items)
    path = f"{PATH}/{made['id']}/input_items"

    async def ids(query: str) -> tuple[list[str], bool]:
        page = (await server.get(path + query)).json
        found = [item["id"] for item in page["data"]]
        assert (page["first_id"], page["last_id"]) == (found[0], found[-1])
        return [id.removeprefix("msg_") for id in found], page["has_more"]

    assert await ids("") == (list("43210"), False)
    assert await ids("?order=asc&limit=2") == (list("01"), True)
    assert await ids("?order=asc&limit=2&after=msg_1") == (list("23"), True)
    assert await ids("?limit=2&after=msg_2") == (list("10"), False)
    for query, param in (
        ("?limit=0", "limit"),
        ("?limit=x", "limit"),
        ("?order=up", "order"),
        ("?after=msg_9", "after"),
    ):
        reply = await server.get(path + query)
        assert (reply.status, reply.error["param"]) == (400, param)


async def test_what_a_query_asks_for_in_vain_is_named(serve):
    server = await serve("Hello")
    made = await ask(server, stream=False)
    for path in ("", "/input_items"):
        reply = await server.get(f"{PATH}/{made['id']}{path}?include=a&include=b&x=1")
        assert (reply.status, reply.headers["X-Ruvon-Ignored"]) == (200, "include,x")


async def test_what_is_not_stored_is_not_there(serve):
    server = await serve("Hello")
    made = await ask(server, store=False)
    assert made["store"] is False
    assert (await server.get(f"{PATH}/{made['id']}")).status == 404
    closed = await serve("Hello", server=ServerConfig(port=0, store_responses=False))
    assert (await ask(closed))["store"] is False
    reply = await closed.post(PATH, {"input": "Hi", "background": True})
    assert (reply.status, reply.error["param"]) == (400, "background")


async def test_a_context_that_is_too_short_may_lose_its_beginning(serve):
    server = await serve(echo, numbers={"max_model_len": 220})
    items = [{"role": "system", "content": "Be brief."}]
    for number in range(20):
        items.append({"role": "user", "content": f"question {number}"})
        items.append({"role": "assistant", "content": f"answer {number}"})
    items.append({"role": "user", "content": "last"})
    reply = await server.post(PATH, {"input": items})
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    made = await ask(server, items, truncation="auto", max_output_tokens=100)
    assert made["truncation"] == "auto"
    assert "Be brief." in text(made)
    assert "question 0" not in text(made)
    assert made["usage"]["input_tokens"] > 80  # and no more is lost than must be
    reply = await server.post(PATH, {"input": "x" * 300, "truncation": "auto"})
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")


async def test_a_conversation_is_compacted_and_goes_on(serve):
    server = await serve(lambda prompt: "We spoke." if "Summarize" in prompt else echo(prompt))
    async with client(server) as ask_it:
        first = await ask_it.responses.create(model="org/fake", input="one")
        compacted = await ask_it.responses.compact(
            model="org/fake", input="two", previous_response_id=first.id
        )
        assert [item.type for item in compacted.output] == ["message", "message", "compaction"]
        assert compacted.usage.output_tokens == 10
        made = await ask_it.responses.create(
            model="org/fake", input=[*(item.to_dict(warnings=False) for item in compacted.output)]
        )
        assert "Summary of the conversation so far:\nWe spoke." in made.output_text


async def test_what_means_nothing_is_named_where_it_is_compacted(serve):
    server = await serve("We spoke.")
    items = [{"type": "mcp_call"}, {"role": "user", "content": "Hi"}]
    reply = await server.post(f"{PATH}/compact", {"input": items})
    assert (reply.status, reply.headers["X-Ruvon-Ignored"]) == (200, "input[0].mcp_call")


# ---------------------------------------------------------------------- the form of the answer


async def test_an_answer_that_is_cut_short(serve):
    server = await serve("Hello")
    made = await ask(server, max_output_tokens=3)
    assert (made["status"], text(made)) == ("incomplete", "Hel")
    assert made["incomplete_details"] == {"reason": "max_output_tokens"}
    events = await ask_events(server, max_output_tokens=3)
    assert events[-1]["type"] == "response.incomplete"


async def test_log_probabilities(serve):
    server = await serve("Hello")
    for fields in ({"include": ["message.output_text.logprobs"]}, {"top_logprobs": 2}):
        made = await ask(server, **fields)
        scores = made["output"][0]["content"][0]["logprobs"]
        assert "".join(entry["token"] for entry in scores) == "Hello"
        assert {len(entry["top_logprobs"]) for entry in scores} == {fields.get("top_logprobs", 0)}
        events = await ask_events(server, **fields)
        assert events[-1]["response"]["output"][0]["content"][0]["logprobs"] == scores
    reply = await server.post(PATH, {"input": "Hi", "top_logprobs": 21})
    assert (reply.status, reply.error["param"]) == (400, "top_logprobs")


async def test_extensions_and_what_has_no_effect(serve):
    server = await serve("Hello")
    reply = await server.post(
        PATH,
        {
            "input": [{"type": "mcp_call"}, {"role": "user", "content": "Hi"}],
            "seed": 1,
            "top_k": 3,
            "stop": "l",
            "service_tier": "flex",
            "include": ["reasoning.encrypted_content", "more"],
        },
    )
    assert text(reply.json) == "He"
    ignored = set(reply.headers["X-Ruvon-Ignored"].split(","))
    assert ignored == {"service_tier", "input[0].mcp_call", "include[1]"}
    strict = await serve("Hello", server=ServerConfig(port=0, strict=True))
    reply = await strict.post(
        PATH, {"input": [{"type": "mcp_call"}, {"role": "user", "content": ""}]}
    )
    assert (reply.status, reply.error["param"]) == (400, "input[0].mcp_call")


# ---------------------------------------------------------------------- in the background


async def wait_for(server: Server, id: str, status: str) -> Any:
    """A response of the background, once it has ended."""
    entry = server.app[RESPONSES].get(id)
    await server.until(lambda: entry.writer is None)
    made = (await server.get(f"{PATH}/{id}")).json
    check_response(made)
    assert made["status"] == status
    return made


async def test_in_the_background(serve):
    server = await serve("Hello")
    queued = await ask(server, background=True)
    assert (queued["status"], queued["output"], queued["usage"]) == ("queued", [], None)
    made = await wait_for(server, queued["id"], "completed")
    assert text(made) == "Hello"
    assert (await server.post(f"{PATH}/{made['id']}/cancel")).json == made
    reply = await server.get(f"{PATH}/{made['id']}?stream=true")
    events = parse_events(reply.body)
    assert check_stream(events) == made
    assert [event["type"] for event in events[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    again = await ask(server, "More", previous_response_id=made["id"])
    assert again["usage"]["input_tokens"] > made["usage"]["input_tokens"]


async def test_a_stream_of_the_background_outlives_its_reader(serve):
    server = await serve(runner=ScriptRunner("x" * 100, seconds=0.001))
    async with client(server) as ask_it:
        stream = await ask_it.responses.create(
            model="org/fake", input="Hi", background=True, stream=True
        )
        seen = []
        async for event in stream:
            seen.append(event.to_dict())
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        id = seen[0]["response"]["id"]
        rest = await ask_it.responses.retrieve(
            id, stream=True, starting_after=seen[-1]["sequence_number"]
        )
        seen += [event.to_dict() async for event in rest]
    assert text(check_stream(seen)) == "x" * 100


async def test_who_reads_what_is_no_longer_kept_is_told(serve):
    server = await serve(
        runner=ScriptRunner("x" * 200, seconds=0.001),
        server=ServerConfig(port=0, response_store_size="100KiB"),
    )
    async with client(server) as ask_it:
        stream = await ask_it.responses.create(
            model="org/fake", input="Hi", background=True, stream=True
        )
        events = [event async for event in until_error(stream, "no longer kept")]
        made = await wait_for(server, events[0].response.id, "completed")
        assert text(made) == "x" * 200
        reply = await server.get(f"{PATH}/{made['id']}?stream=true")
        assert (reply.status, reply.error["param"]) == (400, "stream")


async def test_counting_names_what_it_skips(serve):
    server = await serve("Hello")
    items = [{"type": "mcp_call"}, {"role": "user", "content": "Hi"}]
    reply = await server.post(PATH + "/input_tokens", {"input": items})
    assert (reply.json["input_tokens"], reply.headers["X-Ruvon-Ignored"]) == (
        21,
        "input[0].mcp_call",
    )


async def test_cancelling(serve):
    server = await serve(runner=ScriptRunner("x" * 400, seconds=0.001))
    queued = await ask(server, background=True)
    path = f"{PATH}/{queued['id']}"
    tail = asyncio.create_task(server.get(path + "?stream=true"))
    await server.until(lambda: server.fake.plans)
    reply = await server.post(path + "/cancel")
    assert reply.json["status"] == "cancelled"
    check_response(reply.json)
    await server.until(lambda: server.idle)
    assert (await server.get(path)).json == reply.json
    last = parse_events((await tail).body)[-1]
    assert (last["type"], last["response"]) == ("response.failed", reply.json)
    made = await ask(server, max_output_tokens=2)
    refused = await server.post(f"{PATH}/{made['id']}/cancel")
    assert refused.status == 400


async def test_deleting_ends_what_runs(serve):
    server = await serve(runner=ScriptRunner("x" * 400, seconds=0.001))
    queued = await ask(server, background=True)
    path = f"{PATH}/{queued['id']}"
    reply = await server.session.delete(server.url + path)
    assert await reply.json() == {"id": queued["id"], "object": "response", "deleted": True}
    await server.until(lambda: server.idle)
    assert (await server.get(path)).status == 404


async def test_a_failure_in_the_background(serve):
    server = await serve(runner=Fails("Hello"))
    queued = await ask(server, background=True)
    made = await wait_for(server, queued["id"], "failed")
    assert made["error"]["message"] == "NaN in the logits"
    events = parse_events((await server.get(f"{PATH}/{made['id']}?stream=true")).body)
    assert [event["type"] for event in events[-2:]] == ["response.failed", "error"]


async def test_shutting_down_ends_the_background(serve):
    server = await serve(runner=ScriptRunner("x" * 400, seconds=0.01))
    await ask(server, background=True)
    await server.runner.cleanup()
    assert len(server.fake.plans) < 300


async def test_who_leaves_a_stream_that_nobody_reads_again_frees_it(serve):
    server = await serve(runner=ScriptRunner("x" * 400, seconds=0.001))
    async with client(server) as ask_it:
        stream = await ask_it.responses.create(model="org/fake", input="Hi", stream=True)
        async with aclosing(stream.response):
            first = await anext(aiter(stream))
        await server.until(lambda: server.idle)
        with pytest.raises(openai.NotFoundError):
            await ask_it.responses.retrieve(first.response.id)


async def test_what_was_not_streamed_cannot_be_read_again(serve):
    server = await serve("Hello")
    made = await ask(server)
    reply = await server.get(f"{PATH}/{made['id']}?stream=true")
    assert (reply.status, reply.error["param"]) == (400, "stream")
    reply = await server.get(f"{PATH}/{made['id']}?starting_after=1")
    assert (reply.status, reply.headers["X-Ruvon-Ignored"]) == (200, "starting_after")
    reply = await server.get(f"{PATH}/{made['id']}?stream=true&starting_after=x")
    assert (reply.status, reply.error["param"]) == (400, "starting_after")
    reply = await server.get(f"{PATH}/{made['id']}?stream=maybe")
    assert (reply.status, reply.error["param"]) == (400, "stream")
    reply = await server.get(f"{PATH}/compact")
    assert (reply.status, reply.headers["Allow"]) == (405, "POST")


# ---------------------------------------------------------------------- tools

ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}}


def calls_add(prompt: str) -> str:
    """A model that calls a function once, and then says what came of it."""
    if "<tool_response>" in prompt:
        return "It is " + prompt.split("<tool_response>\n")[-1].split("\n")[0]
    return 'I add.<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


async def test_a_loop_of_calls(serve):
    server = await serve(calls_add, numbers={"max_model_len": 2048})
    events = await ask_events(server, "1+1?", tools=[ADD])
    final = events[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["message", "function_call"]
    call = final["output"][1]
    assert (call["name"], call["arguments"]) == ("add", '{"a": 1}')
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "2"}
    made = await ask(server, [result], previous_response_id=final["id"], tools=[ADD])
    assert text(made) == "It is 2"
    parts = {**result, "output": [{"type": "input_text", "text": "3"}]}
    made = await ask(server, [{"role": "user", "content": "1+1?"}, call, parts], tools=[ADD])
    assert text(made) == "It is 3"


async def test_the_requests_of_codex(serve):
    """As its command line sends them, with tools of every kind that it knows."""
    server = await serve(calls_add, numbers={"max_model_len": 8192})
    group = {"type": "namespace", "name": "mcp__calc__", "description": "", "tools": [ADD]}
    patch = {
        "type": "custom",
        "name": "apply_patch",
        "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'},
    }
    fields = {
        "model": "org/fake",
        "instructions": "You are a coding agent.",
        "tools": [ADD, patch, group, {"type": "web_search", "external_web_access": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "c0dec",
        "text": {"verbosity": "low"},
        "client_metadata": {"x": "y"},
    }
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1+1?"}]},
    ]
    events = await ask_events(server, items, **fields)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    result = {"type": "function_call_output", "call_id": done[-1]["call_id"], "output": "2"}
    late = {"type": "message", "role": "developer", "content": "b"}
    events = await ask_events(server, [*items, *done, result, late], **fields)
    assert text(events[-1]["response"]) == "It is 2"
    usage = events[-1]["response"]["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] > 0


async def test_tools_that_are_not_served(serve):
    server = await serve("Hello")
    search = {"type": "web_search"}
    reply = await server.post(PATH, {"input": "Hi", "tools": [search]})
    assert (reply.status, reply.error["param"]) == (400, "tools[0]")
    assert "web_search" in reply.error["message"]
    reply = await server.post(PATH, {"input": "Hi", "tools": [ADD, search]})
    assert reply.headers["X-Ruvon-Ignored"] == "tools[1].web_search"
    assert [tool["name"] for tool in reply.json["tools"]] == ["add"]
