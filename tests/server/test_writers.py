"""Writers alone: the chunks of a stream add up to the whole, whatever the deltas are."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from fakes import fake_logprobs
from hypothesis import given
from hypothesis import strategies as st
from serving import byte_tokenizer

from ruvon.deltas import Delta, ToolCall
from ruvon.engine.stream import Stream
from ruvon.engine.types import Emission, Job
from ruvon.server.schemas import ChatRequest, CompletionRequest
from ruvon.server.writers.chat import ChatWriter
from ruvon.server.writers.completions import CompletionsWriter

SERVICE: Any = SimpleNamespace(tokenizer=byte_tokenizer(), names=("m",), fingerprint="fp_1")
JOB = Job(tuple(b"Hi"), n=2)


def made(index: int, text: str, reasoning: str, ids: list[int]) -> Delta:
    scores = [fake_logprobs(token, 1) for token in ids]
    return Delta(index, text, reasoning, tokens=ids, logprobs=scores, num_cached=16)


pieces = st.builds(
    made,
    st.integers(0, 1),
    st.text(max_size=3),
    st.text(max_size=3),
    st.lists(st.integers(97, 122), max_size=3),
)


def called(index: int, calls: list[tuple[str, bool, list[str]]]) -> list[Delta]:
    """The deltas of tool calls: a name, whether it is a custom tool's, and pieces of its input."""
    deltas = []
    for number, (name, custom, pieces) in enumerate(calls):
        id = f"call_{index}{number}"
        first = ToolCall(number, id, name, "".join(pieces[:1]), custom)
        later = [ToolCall(number, arguments=piece, custom=custom) for piece in pieces[1:]]
        deltas += [Delta(index, tool_call=call, tokens=[97]) for call in (first, *later)]
    return deltas


calls = st.lists(
    st.tuples(st.sampled_from("fgh"), st.booleans(), st.lists(st.text(max_size=3), max_size=3)),
    max_size=3,
)


def ended(deltas: list[Delta]) -> list[Delta]:
    return [*deltas, *(Delta(index, finish="stop", stop_reason="x") for index in range(2))]


def streamed(writer: ChatWriter | CompletionsWriter, deltas: list[Delta]) -> list[Any]:
    data = writer.opening() + b"".join(map(writer.events, deltas)) + writer.closing()
    return [orjson.loads(line[6:]) for line in data.split(b"\n\n") if line]


def whole(writer: ChatWriter | CompletionsWriter, deltas: list[Delta]) -> Any:
    for delta in deltas:
        writer.feed(delta)
    return orjson.loads(orjson.dumps(writer.result()))


@given(st.lists(pieces, max_size=8))
def test_a_chat_adds_up(deltas):
    deltas = ended([replace(d, text="") if d.reasoning else d for d in deltas])
    fields = {"messages": [{"role": "user", "content": "Hi"}], "n": 2, "return_token_ids": True}
    fields |= {"logprobs": True, "top_logprobs": 1}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunk = ChatWriter(ChatRequest.model_validate(fields | options), JOB, SERVICE)
    events = streamed(chunk, deltas)
    answer = whole(ChatWriter(ChatRequest.model_validate(fields), JOB, SERVICE), deltas)
    assert events[-1]["usage"] == answer["usage"]
    for choice in answer["choices"]:
        mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == choice["index"]]
        said = choice["message"]
        assert "".join(c["delta"].get("content", "") for c in mine) == said["content"]
        assert "".join(c["delta"].get("reasoning", "") for c in mine) == said.get("reasoning", "")
        assert [i for c in mine for i in c.get("token_ids", [])] == choice["token_ids"]
        scores = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert scores == (choice["logprobs"] or {"content": []})["content"]
        assert (mine[-1]["finish_reason"], mine[-1]["stop_reason"]) == ("stop", "x")


@given(calls, calls, st.text(max_size=3))
def test_tool_calls_add_up(ones, others, text):
    """A stream's pieces, put together as the SDKs do it, are the whole answer's calls."""
    before = [Delta(0, text)] if text else []
    deltas = ended([*before, *called(0, ones), *called(1, others)])
    fields = {"messages": [{"role": "user", "content": "Hi"}], "n": 2}
    events = streamed(chat_writer(fields | {"stream": True}), deltas)
    answer = whole(chat_writer(fields), deltas)
    for choice, wanted in zip(answer["choices"], (ones, others), strict=True):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        pieces = [piece for c in mine for piece in c["delta"].get("tool_calls", ())]
        assert choice["message"].get("tool_calls", []) == accumulated(pieces)
        assert told(choice["message"]) == [(n, c, "".join(p)) for n, c, p in wanted]
        assert ("tool_calls" in choice["message"]) == bool(wanted)
        reason = "tool_calls" if wanted else "stop"
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == reason
    content = answer["choices"][0]["message"]["content"]
    assert content == (None if ones and not text else text)


def chat_writer(fields: dict[str, Any]) -> ChatWriter:
    return ChatWriter(ChatRequest.model_validate(fields), JOB, SERVICE)


def accumulated(pieces: list[Any]) -> list[Any]:
    """Each call's pieces: who is called comes once, and first."""
    calls: list[Any] = []
    for piece in pieces:
        index = piece.pop("index")
        if "id" in piece:
            assert index == len(calls)
            calls.append(piece)
        else:
            (kind,) = piece
            ((key, text),) = piece[kind].items()
            calls[index][kind][key] += text
    return calls


def told(message: Any) -> list[tuple[str, bool, str]]:
    found = []
    for call in message.get("tool_calls", ()):
        said = call[call["type"]]
        is_custom = call["type"] == "custom"
        found.append((said["name"], is_custom, said["input" if is_custom else "arguments"]))
    return found


def test_a_call_is_told_once_and_then_only_its_arguments():
    writer = chat_writer({"messages": [{"role": "user", "content": "Hi"}], "stream": True})
    events = streamed(writer, called(0, [("f", False, ['{"a"', ":1}"])]))
    assert [e["choices"][0]["delta"] for e in events[2:]] == [
        {
            "tool_calls": [
                {
                    "index": 0, "id": "call_00", "type": "function",
                    "function": {"name": "f", "arguments": ""},
                }
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "content", "reasoning"),
    [
        ({}, "ok", "hm, so"),
        ({"include_reasoning": True, "reasoning_format": "deepseek"}, "ok", "hm, so"),
        ({"include_reasoning": False}, "ok", None),
        ({"reasoning_format": "hidden"}, "ok", None),
        ({"separate_reasoning": False}, "<think>hm, so</think>ok", None),
        ({"reasoning_format": "none"}, "<think>hm, so</think>ok", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_where_reasoning_goes(stream, fields, content, reasoning):
    deltas = [
        Delta(reasoning="hm, ", tokens=[1, 2], num_reasoning=2),
        Delta(reasoning="so", tokens=[3], num_reasoning=1),
        Delta(text="ok", tokens=[4]),
    ]
    base = {"messages": [{"role": "user", "content": "Hi"}], "n": 2}
    if stream:
        base |= {"stream": True, "stream_options": {"include_usage": True}}
        *events, last = streamed(chat_writer(base | fields), ended(deltas))
        mine = [c["delta"] for e in events for c in e["choices"] if c["index"] == 0]
        assert "".join(delta.get("content", "") for delta in mine) == content
        assert "".join(delta.get("reasoning_content", "") for delta in mine) == (reasoning or "")
    else:
        last = whole(chat_writer(base | fields), ended(deltas))
        message = last["choices"][0]["message"]
        assert message["content"] == content
        assert message.get("reasoning") == message.get("reasoning_content") == reasoning
    assert last["usage"]["completion_tokens_details"]["reasoning_tokens"] == 3


def test_tokens_by_their_ids():
    fields = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "n": 2}
    fields |= {"return_tokens_as_token_ids": True, "top_logprobs": 1}
    scored = [Delta(text="a", tokens=[97], logprobs=[fake_logprobs(97, 1)])]
    (entry,) = whole(chat_writer(fields), ended(scored))["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "token_id:97"
    assert entry["top_logprobs"][0]["token"].startswith("token_id:")
    fields = {"prompt": "Hi", "n": 2, "logprobs": 1, "return_tokens_as_token_ids": True}
    writer = CompletionsWriter(CompletionRequest.model_validate(fields), [JOB], SERVICE)
    logprobs = whole(writer, ended(scored))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:97"]
    assert "token_id:97" in logprobs["top_logprobs"][0]


@given(st.lists(pieces, max_size=8))
def test_completions_add_up(deltas):
    deltas = ended(deltas)
    fields = {"prompt": "Hi", "n": 2, "logprobs": 1, "return_token_ids": True}
    chunk = CompletionsWriter(
        CompletionRequest.model_validate(fields | {"stream": True}), [JOB], SERVICE
    )
    events = streamed(chunk, deltas)
    answer = whole(
        CompletionsWriter(CompletionRequest.model_validate(fields), [JOB], SERVICE), deltas
    )
    for choice in answer["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"]
        assert [i for c in mine for i in c["token_ids"]] == choice["token_ids"]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            scores = [value for c in mine if c["logprobs"] for value in c["logprobs"][key]]
            assert scores == (choice["logprobs"] or {key: []})[key]
        assert mine[-1]["finish_reason"] == choice["finish_reason"] == "stop"


class Parrot:
    """A `Generator` with no engine: it says the prompt again."""

    max_model_len = 64
    vocab_size = 260
    dead = None
    stalled_for = progressed_at = 0.0
    num_open = num_arriving = 0
    load = (1, 2, 0.5)

    def start(self) -> None: ...

    async def stop(self, timeout: float) -> None: ...

    async def admission(self, tenant: str) -> None: ...

    @property
    def preparation(self) -> Parrot:
        return self

    def prepare_quickly(self, job: Job) -> Job:
        return job

    def check_compiled(self, grammars: object) -> None: ...

    def compile(self, grammars: object) -> list[object]:
        return []

    def progress(self, stream: Stream) -> str:
        return ""

    def describe(self) -> dict[str, object]:
        return {}

    def fail(self, error: Exception) -> None: ...

    def generate(self, jobs: list[Job], timeout: float | None = None) -> Stream:
        stream = Stream(lambda stream, ids, reason: stream.open.difference_update(ids))
        for index, job in enumerate(jobs):
            stream.open.add(index)
            stream.put(Emission(index, index, job.prompt, finish="length"))
        return stream


@pytest.mark.parametrize("stream", [False, True])
async def test_the_server_serves_any_generator(serve, stream):
    server = await serve()
    await server.service.generator.stop(0)
    server.state.service = replace(server.service, generator=Parrot())
    reply = await server.complete(["one", "two"], stream=stream)
    answers = reply.events if stream else [reply.json]
    assert [c["text"] for answer in answers for c in answer["choices"]] == ["one", "two"]
    for path in ("/health", "/ready", "/live"):
        assert (await server.get(path)).status == 200
    assert (await server.get("/v1/models")).json["data"][0]["max_model_len"] == 64
    assert b"num_requests_waiting" in (await server.get("/metrics")).body
