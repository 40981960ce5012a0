"""``/v1/messages``, as Anthropic's clients see it."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from serving import Fails, Reply, ScriptRunner, Server, byte_tokenizer

import ruvon
from ruvon.config import ServerConfig
from ruvon.deltas import Delta, ToolCall
from ruvon.engine.types import Job
from ruvon.errors import RequestError
from ruvon.server.messages_api.convert import convert, sign
from ruvon.server.messages_api.responses import Message, TextBlock, ThinkingBlock, ToolUseBlock
from ruvon.server.messages_api.schemas import MessagesRequest
from ruvon.server.messages_api.writer import MessagesWriter
from ruvon.server.parsing import parse

PATH = "/v1/messages"
REFERENCE = Path(ruvon.__file__).parents[1] / "docs" / "reference" / "api.md"
HEADERS = {"anthropic-version": "2023-06-01", "x-api-key": "none"}
USER = {"role": "user", "content": "Hi"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}

DELTA_KEYS = {
    "text_delta": {"type", "text"},
    "thinking_delta": {"type", "thinking"},
    "signature_delta": {"type", "signature"},
    "input_json_delta": {"type", "partial_json"},
}
MESSAGE, BLOCK = TypeAdapter(Message), TypeAdapter(TextBlock | ThinkingBlock | ToolUseBlock)
FIELDS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}


async def ask(server: Server, messages: object = (USER,), **fields: Any) -> Reply:
    body = {"model": "org/fake", "max_tokens": 64, "messages": messages} | fields
    return await server.post(PATH, body, headers=HEADERS)


def events(data: bytes) -> list[dict[str, Any]]:
    """The events of a stream, each named as its data says."""
    found = []
    for part in data.decode().removesuffix("\n\n").split("\n\n"):
        name, _, line = part.partition("\n")
        found.append(orjson.loads(line.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def exact(kind: TypeAdapter[Any], value: object) -> bool:
    """Whether a value is of a type, to the last key."""
    return bool(kind.validate_python(value, strict=True) == value)


def gathered(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client puts together, block for block as the protocol has it."""
    first, *middle, last, stop = stream
    assert first["type"] == "message_start"
    assert (last["type"], stop) == ("message_delta", {"type": "message_stop"})
    message = first["message"]
    assert exact(MESSAGE, message)
    content: list[dict[str, Any]] = message["content"]
    texts: list[str] | None = None
    for event in middle:
        if event["type"] == "content_block_start":
            assert texts is None
            assert event["index"] == len(content)
            assert exact(BLOCK, event["content_block"])
            content.append(event["content_block"])
            texts = []
            continue
        assert texts is not None
        assert event["index"] == len(content) - 1
        if event["type"] == "content_block_stop":
            kind = content[-1]["type"]
            whole = "".join(texts)
            content[-1]["input" if kind == "tool_use" else kind] = (
                orjson.loads(whole or "{}") if kind == "tool_use" else whole
            )
            texts = None
            continue
        delta = event["delta"]
        assert delta.keys() == DELTA_KEYS[delta["type"]]
        if delta["type"] == "signature_delta":
            content[-1]["signature"] = delta["signature"]
        else:
            texts.append(delta[FIELDS[delta["type"]]])
    assert texts is None
    whole = message | last["delta"] | {"usage": message["usage"] | last["usage"]}
    assert exact(MESSAGE, whole)
    return whole


# ---------------------------------------------------------------------- answers


async def test_a_whole_answer_has_every_field(serve):
    server = await serve("Hello")
    reply = await ask(server)
    answer = reply.json
    assert reply.status == 200
    assert reply.headers["Request-Id"] == reply.headers["X-Request-Id"]
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "org/fake",
        "content": [{"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 21,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 6,
            "output_tokens_details": {"thinking_tokens": 0},
            "service_tier": "standard",
        },
    }
    server.assert_idle()


async def test_a_stream_adds_up_to_the_whole(serve):
    server = await serve("Hé you")
    whole = (await ask(server)).json
    reply = await server.post(
        f"{PATH}?beta=true",
        {"max_tokens": 64, "messages": [USER], "stream": True},
        headers=HEADERS | {"anthropic-beta": "anything-2030-01-01"},
    )
    assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    stream = events(reply.body)
    assert stream[0]["message"]["usage"] == whole["usage"] | {
        "input_tokens": 5, "cache_read_input_tokens": 16, "output_tokens": 0,
    } | {"output_tokens": stream[0]["message"]["usage"]["output_tokens"]}  # fmt: skip
    message = gathered(stream)
    assert {**message, "id": whole["id"], "usage": 0} == {**whole, "usage": 0}
    assert message["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


async def test_why_an_answer_ended(serve):
    server = await serve("Hello World", numbers={"max_model_len": 32})

    async def why(**fields: Any) -> tuple[str, str | None, str]:
        answer = (await ask(server, **fields)).json
        text = "".join(block["text"] for block in answer["content"])
        return answer["stop_reason"], answer["stop_sequence"], text

    assert await why(stop_sequences=["nothing", "lo W"]) == ("stop_sequence", "lo W", "Hel")
    assert await why(max_tokens=5) == ("max_tokens", None, "Hello")
    assert await why(max_tokens=0) == ("max_tokens", None, "")
    assert await why(max_tokens=9999) == ("model_context_window_exceeded", None, "Hello World")


async def test_a_prompt_that_does_not_fit_is_told_in_the_words_clients_know(serve):
    server = await serve(numbers={"max_model_len": 32})
    for text, told in (
        ("x" * 40, "prompt is too long: 59 tokens > 31 maximum"),
        ("x" * 999, "prompt is too long: This model's maximum context length is 32 tokens."),
    ):
        reply = await ask(server, [{"role": "user", "content": text}])
        assert reply.status == 400
        assert reply.json["error"]["message"].startswith(told)


async def test_a_quiet_stream_sends_pings_after_its_first_event(serve):
    runner = ScriptRunner("ok", by_hand=True)
    server = await serve(runner=runner, server=ServerConfig(port=0, sse_keep_alive_interval=0.1))
    body = {"max_tokens": 9, "messages": [USER], "stream": True}
    async with server.session.post(server.url + PATH, json=body) as response:
        assert response.status == 200  # though there is no token yet
        assert await response.content.readuntil(b"\n\n") == b": prefill 21/21\n\n"
        runner.finish_step()
        stream = await response.content.readuntil(b'event: ping\ndata: {"type":"ping"}\n\n')
        assert stream.removeprefix(b": prefill 21/21\n\n").startswith(b"event: message_start\n")
        rest = asyncio.create_task(response.read())
        await server.finish(rest)
        assert rest.result().endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')


async def test_a_failure_in_mid_stream_is_an_event(serve):
    server = await serve(runner=Fails("Hello"))
    reply = await ask(server, stream=True)
    assert reply.status == 200
    assert events(reply.body)[-1] == {
        "type": "error",
        "error": {
            "type": "api_error",
            "message": "NaN in the logits",
            "details": {"error_code": "generation_failed"},
        },
        "request_id": reply.headers["Request-Id"],
    }
    server.assert_idle()


async def test_errors_have_anthropics_shape(serve):
    server = await serve()
    for fields, status, kind, words in (
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"model": "none"}, 404, "not_found_error", "model"),
        ({"temperature": 3}, 400, "invalid_request_error", "temperature"),
        ({"mcp_servers": [{}]}, 400, "invalid_request_error", "mcp_servers"),
        ({"thread": {"type": "create"}}, 400, "invalid_request_error", "thread"),
    ):
        reply = await ask(server, **fields)
        assert reply.status == status
        answer = reply.json
        assert answer.keys() == {"type", "error", "request_id"}
        assert answer["type"] == "error"
        assert answer["error"]["type"] == kind
        assert words in answer["error"]["message"]
        assert answer["request_id"] == reply.headers["Request-Id"]
    # what the SDK's tool runner looks for, to send whole conversations from then on
    reply = await ask(server, thread={"type": "continue", "previous_message_id": "msg_1"})
    assert reply.json["error"]["details"] == {"error_code": "thread_unsupported_request"}


# ---------------------------------------------------------------------- models, counts


async def test_models_in_anthropics_shape_to_its_header(serve):
    server = await serve(server=ServerConfig(port=0, served_model_name="m, claude-local"))
    page = (await server.get("/v1/models", headers=HEADERS)).json
    assert {key: page[key] for key in ("has_more", "first_id", "last_id")} == {
        "has_more": False, "first_id": "m", "last_id": "claude-local",
    }  # fmt: skip
    one = (await server.get("/v1/models/claude-local", headers=HEADERS)).json
    assert one == page["data"][1]
    assert one.pop("created_at").endswith("Z")
    assert one == {
        "type": "model", "id": "claude-local", "display_name": "claude-local",
        "lifecycle": "active", "max_input_tokens": 511, "max_tokens": 511,
    }  # fmt: skip
    second = (await server.get("/v1/models?limit=1&after_id=m", headers=HEADERS)).json
    assert [card["id"] for card in second["data"]] == ["claude-local"]
    first = (await server.get("/v1/models?limit=1", headers=HEADERS)).json
    assert ([card["id"] for card in first["data"]], first["has_more"]) == (["m"], True)
    assert (await server.get("/v1/models")).json["object"] == "list"
    missing = await server.get("/v1/models/none", headers=HEADERS)
    assert (missing.status, missing.json["error"]["type"]) == (404, "not_found_error")


async def test_count_tokens_counts_what_a_request_reads(serve):
    server = await serve("Hello")
    body = {"system": "Be brief.", "messages": [USER]}
    counted = await server.post(f"{PATH}/count_tokens", body, headers=HEADERS)
    usage = (await ask(server, **body)).json["usage"]
    assert counted.json == {"input_tokens": usage["input_tokens"]}


# ---------------------------------------------------------------------- volatile and foreign

CLAUDE_CODE = [
    {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch={};"},
    {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
    {"type": "text", "text": "Be useful.\n\n<total_tokens>{} tokens left</total_tokens>"},
]


def system(nonce: int) -> list[dict[str, Any]]:
    return [block | {"text": block["text"].replace("{}", str(nonce))} for block in CLAUDE_CODE]


async def test_a_system_prompt_that_changes_with_every_request_is_found_in_the_cache(serve):
    server = await serve("ok", numbers={"max_model_len": 512})
    cached = []
    for nonce in (11111, 22222):
        reply = await ask(server, system=system(nonce))
        cached.append(reply.json["usage"]["cache_read_input_tokens"])
        assert reply.headers["X-Ruvon-Ignored"] == (
            "system[0].x-anthropic-billing-header,system[2].total_tokens"
        )
    assert cached == [0, 48]


async def test_what_only_anthropics_servers_understand_is_skipped_by_name(serve):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
            {"type": "text", "text": "So"},
        ]},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    fields = {
        "tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 2}],
        "context_management": {"edits": [{}]},
        "metadata": {"user_id": "u"},
    }
    server = await serve("ok")
    reply = await ask(server, turns, **fields)
    assert reply.status == 200
    assert set(reply.headers["X-Ruvon-Ignored"].split(",")) == {
        "metadata", "context_management",
        "tools[0].web_search_20250305", "messages[1].content[0].server_tool_use",
    }  # fmt: skip
    reply = await ask(server, output_config={"effort": "low"})  # its template knows none
    assert reply.headers["X-Ruvon-Ignored"] == "output_config.effort"
    strict = await serve("ok", server=ServerConfig(port=0, strict=True))
    reply = await ask(strict, turns, metadata={"user_id": "u"}, system=system(1))
    assert reply.status == 400
    assert "messages[1].content[0].server_tool_use" in reply.json["error"]["message"]
    reply = await ask(strict, metadata={"user_id": "u"}, context_management={"edits": []})
    assert reply.status == 200


# ---------------------------------------------------------------------- conversion


def told(turns: list[Any], **fields: Any) -> Any:
    body = {"max_tokens": 9, "messages": turns} | fields
    return convert(parse(MessagesRequest, body)[0])[0]


def test_turns_of_blocks_become_messages():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": "x"},
            {"type": "redacted_thinking", "data": "x"},
            {"type": "text", "text": "Let me see."},
            {"type": "tool_use", "id": "t1", "name": "f", "input": {"é": [1]}},
            {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "content": "one"},
            {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": [
                {"type": "text", "text": "no"}, {"type": "text", "text": "way"},
            ]},
            {"type": "tool_result", "tool_use_id": "t3"},
            {"type": "text", "text": "Go on."},
        ]},
        {"role": "system", "content": "Quick."},
    ]  # fmt: skip
    call = {"type": "function", "function": {"name": "f", "arguments": '{"é":[1]}'}}
    asked = told(messages, system="Be brief.")
    assert asked.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb\nc"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "t1", **call},
                {"id": "t2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "one"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no\nway"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "Go on."},
        {"role": "system", "content": "Quick."},
    ]
    assert not asked.continue_final_message


def test_a_last_turn_of_the_assistant_is_continued():
    assert told([USER, {"role": "assistant", "content": "The"}]).continue_final_message
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    with pytest.raises(RequestError, match="cannot be"):
        told([USER, {"role": "assistant", "content": [call]}])


def test_thoughts_that_were_not_shown_come_back_in_their_signature():
    def thought(signature: str) -> Any:
        block = {"type": "thinking", "thinking": "", "signature": signature}
        return told([USER, {"role": "assistant", "content": [block]}]).messages[1]

    assert thought(sign("é?"))["reasoning_content"] == "é?"
    for foreign in ("", "EqoB", "ruvon:???", "ruvon:/w=="):
        assert "reasoning_content" not in thought(foreign)


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({}, ("auto", (), True)),
        ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, ("auto", (), False)),
        ({"tool_choice": {"type": "any"}}, ("required", (), True)),
        ({"tool_choice": {"type": "tool", "name": "f"}}, ("required", ("f",), True)),
        ({"tool_choice": {"type": "none"}}, ("none", (), True)),
    ],
)
def test_tools_and_their_choice(fields, choice):
    asked = told([USER], tools=[TOOL | {"strict": True}], **fields)
    assert (asked.choice.mode, asked.choice.names, asked.choice.parallel) == choice
    (tool,) = asked.tools
    assert (tool.name, tool.description, tool.strict) == ("f", "d", True)
    assert tool.parameters == {"type": "object"}


FORM = {"type": "json_schema", "schema": {"type": "object"}}


def test_thinking_effort_and_form():
    asked = told([USER], thinking={"type": "enabled", "budget_tokens": 8})
    assert (asked.reasoning.enabled, asked.reasoning.budget) == (True, 8)
    schema = {"type": "object", "properties": {}}
    form = {"type": "json_schema", "schema": schema}
    asked = told([USER], output_config={"effort": "low", "format": form})
    assert asked.reasoning.effort == "low"
    assert asked.response == told([USER], output_config={"format": form}).response is not None
    assert told([USER], output_format=form).response.param == "output_format.schema"
    for kind, enabled in (("adaptive", None), ("disabled", False), ("between_tools", False)):
        assert told([USER], thinking={"type": kind}).reasoning.enabled is enabled


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any", "name": "f"}}, "tool_choice.name"),
        ({"tools": [], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "max_tokens"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 1}}, "thinking.budget_tokens"),
        ({"output_format": {"type": "text"}}, "output_format.type"),
        ({"output_format": FORM, "output_config": {"format": FORM}}, "output_format"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "document"}]},
            ]}]},
            "messages[0].content[0].content[0]",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(fields, where):
    with pytest.raises(RequestError) as error:
        told([USER], **{"tools": [TOOL]} | fields)
    assert error.value.param == where


def test_what_is_documented_is_declared():
    section = REFERENCE.read_text().partition("\n## Messages\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)`", section, re.MULTILINE)
    assert set(rows) == set(MessagesRequest.model_fields)
    harmless = section.partition("Without effect")[2].partition("blocks and tools")[0]
    assert set(re.findall(r"`(\w+)`", harmless)) == MessagesRequest.HARMLESS | {"service_tier"}


# ---------------------------------------------------------------------- the writer alone

SERVICE: Any = SimpleNamespace(tokenizer=byte_tokenizer(), names=("m",), max_model_len=99)
JOB = Job(tuple(b"Hi"))
ARGUMENTS = '{"city": "Zürich", "days": [1, 2]}'


def writer(**fields: Any) -> MessagesWriter:
    body = {"max_tokens": 9, "messages": [USER]} | fields
    return MessagesWriter(parse(MessagesRequest, body)[0], JOB, SERVICE, "r1")


def answer(deltas: list[Delta], **fields: Any) -> Any:
    """The answer, the same whole and streamed."""
    whole = writer(**fields)
    for delta in deltas:
        whole.feed(delta)
    result = orjson.loads(orjson.dumps(whole.result()))
    stream = writer(**fields, stream=True)
    data = stream.opening() + b"".join(map(stream.events, deltas)) + stream.closing()
    assert {**gathered(events(data)), "id": result["id"]} == result
    return result


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [piece for piece in [*pieces, text] if piece]


def said(sizes: list[int]) -> list[Delta]:
    """The same answer, cut into pieces somewhere."""
    deltas = [Delta(reasoning=piece) for piece in cut("\nLet me think.\n", sizes)]
    deltas += [Delta(text=piece) for piece in cut("\n\nI will look.\n", sizes)]
    for index, arguments in enumerate((ARGUMENTS, "{}", "")):
        head = ToolCall(index, id=f"call_{index}", name="f")
        deltas.append(Delta(tool_call=head))
        deltas += [Delta(tool_call=ToolCall(index, arguments=p)) for p in cut(arguments, sizes)]
        deltas += [Delta(text=piece) for piece in cut("\n \n", sizes)]
    return [*deltas, Delta(finish="stop")]


@given(st.lists(st.integers(1, 9), max_size=9), st.booleans())
def test_however_an_answer_is_cut_it_is_the_same(sizes, hidden):
    display = {"thinking": {"type": "adaptive", "display": "omitted"}} if hidden else {}
    result = answer(said(sizes), **display)
    signature = result["content"][0]["signature"]
    assert result["stop_reason"] == "tool_use"
    assert result["content"] == [
        {
            "type": "thinking",
            "thinking": "" if hidden else "\nLet me think.\n",
            "signature": signature,
        },
        {"type": "text", "text": "\n\nI will look.\n"},
        {"type": "tool_use", "id": "toolu_0", "name": "f", "input": orjson.loads(ARGUMENTS)},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}},
        {"type": "tool_use", "id": "toolu_2", "name": "f", "input": {}},
    ]
    assert signature == sign("\nLet me think.\n" if hidden else "")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ('{"a": 1, "b": "un', {"a": 1}),
        ('{"a": {"b": [1, 2', {"a": {"b": [1, 2]}}),
        ("{", {}),
        ("[1]", {}),
        ("no json", {}),
    ],
)
def test_input_that_broke_off_is_read_as_far_as_it_goes(text, read):
    whole = writer()
    whole.feed(Delta(tool_call=ToolCall(0, "call_0", "f", text)))
    whole.feed(Delta(finish="length"))
    result = whole.result()
    assert result["stop_reason"] == "max_tokens"
    assert result["content"][0]["input"] == read


def test_an_answer_of_white_space_has_no_blocks():
    assert answer([Delta(text=" \n"), Delta(reasoning="\n"), Delta(finish="stop")])["content"] == []
