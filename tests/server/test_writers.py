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

from ruvon.deltas import Delta
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
    stalled_for = 0.0
    load = (1, 2, 0.5)

    def start(self) -> None: ...

    async def stop(self, timeout: float) -> None: ...

    async def admission(self) -> None: ...

    def prepare(self, job: Job) -> Job:
        return job

    def generate(self, jobs: list[Job]) -> Stream:
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
