"""The fold alone: events add up to the object, however the answer is cut into deltas."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from fakes import fake_logprobs
from hypothesis import given, settings
from hypothesis import strategies as st
from response_events import check_response, check_stream, parse_events
from serving import byte_tokenizer

from ruvon.deltas import Delta, ToolCall
from ruvon.engine.types import Job
from ruvon.errors import GenerationError
from ruvon.server.responses_api import output
from ruvon.server.responses_api.prepare import response_fields
from ruvon.server.responses_api.schemas import ResponsesRequest
from ruvon.server.responses_api.tools import Toolbox
from ruvon.server.responses_api.writer import ResponsesWriter, Shape

TOKENIZER = byte_tokenizer()
JOB = Job(tuple(b"Hi"))
FIELDS = response_fields(
    ResponsesRequest.model_validate({"input": "Hi"}),
    JOB,
    Toolbox(),
    SimpleNamespace(names=("m",)),  # type: ignore[arg-type]
    kept=True,
)


def writer(**shape: Any) -> ResponsesWriter:
    return ResponsesWriter("resp_1", FIELDS, Shape(**shape), JOB, TOKENIZER)


def streamed(made: ResponsesWriter, deltas: list[Delta]) -> list[Any]:
    data = made.opening() + b"".join(map(made.events, deltas)) + made.closing()
    return parse_events(data)


def whole(made: ResponsesWriter, deltas: list[Delta]) -> Any:
    for delta in deltas:
        made.feed(delta)
    return orjson.loads(orjson.dumps(made.result()))


# ---------------------------------------------------------------------- any cut says the same

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
segments = st.lists(
    st.one_of(
        st.tuples(st.just("reasoning"), texts),
        st.tuples(st.just("text"), texts),
        st.tuples(st.sampled_from(["call", "custom"]), texts),
    ),
    max_size=6,
).filter(lambda parts: all(a[0] != b[0] or a[0][0] == "c" for a, b in pairwise(parts)))


def cut(parts: list[tuple[str, str]], data: st.DataObject) -> list[Delta]:
    """The parts as deltas of any size, a token for each character."""
    deltas, calls = [], 0
    for kind, text in parts:
        places = data.draw(st.sets(st.integers(1, max(len(text) - 1, 1)), max_size=4))
        bounds = [0, *sorted(p for p in places if p < len(text)), len(text)]
        pieces = [text[a:b] for a, b in pairwise(bounds)]
        if kind in ("call", "custom"):
            first = ToolCall(calls, f"call_{calls}", "f", custom=kind == "custom")
            deltas.append(Delta(tool_call=first, tokens=[97]))
            deltas += [
                Delta(
                    tool_call=ToolCall(calls, arguments=piece, custom=kind == "custom"),
                    tokens=[97] * len(piece),
                )
                for piece in pieces
            ]
            calls += 1
            continue
        for piece in pieces:
            delta = Delta(**{kind: piece}, tokens=[97] * len(piece))
            delta.logprobs = [fake_logprobs(97, 1)] * len(piece)
            delta.num_reasoning = len(piece) if kind == "reasoning" else 0
            deltas.append(delta)
    reason = data.draw(st.sampled_from(["stop", "length"]))
    return [*deltas, Delta(finish=reason)]


def without_ids(response: Any) -> Any:
    for item in response["output"]:
        del item["id"]
    del response["created_at"], response["completed_at"]
    return response


@settings(deadline=None)  # the first call builds the classes that events are held against
@given(segments, st.data())
def test_any_cut_gives_the_same_object_and_the_events_add_up_to_it(parts, data):
    shape = {"logprobs": True, "summary": True, "sealed": True}
    deltas = cut(parts, data)
    final = check_stream(streamed(writer(**shape), deltas))
    answer = whole(writer(**shape), deltas)
    check_response(answer)
    assert without_ids(final) == without_ids(answer)
    again = [*cut(parts, data)[:-1], deltas[-1]]
    assert without_ids(whole(writer(**shape), again)) == answer
    kinds = {"reasoning": "reasoning", "text": "message", "call": "function_call"}
    wanted = [kinds.get(kind, "custom_tool_call") for kind, _ in parts]
    cut_short = deltas[-1].finish == "length"
    assert [item["type"] for item in answer["output"]] == wanted or (not wanted and not cut_short)


# ---------------------------------------------------------------------- the order of events

ITEM = ["output_item.added", "output_item.done"]
EXPECTED = [
    "created",
    "in_progress",
    "output_item.added",
    "content_part.added",
    "reasoning_text.delta",
    "reasoning_text.delta",
    "reasoning_text.done",
    "content_part.done",
    "output_item.done",
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
    "output_item.added",
    "function_call_arguments.delta",
    "function_call_arguments.delta",
    "function_call_arguments.done",
    "output_item.done",
    "output_item.added",
    "custom_tool_call_input.delta",
    "custom_tool_call_input.done",
    "output_item.done",
    "completed",
]
ALL_KINDS = [
    Delta(reasoning="Let me ", tokens=[1], num_reasoning=1),
    Delta(reasoning="see.", tokens=[1, 2], num_reasoning=2),
    Delta(text="I call.", tokens=[3]),
    Delta(tool_call=ToolCall(0, "call_a", "f"), tokens=[4]),
    Delta(tool_call=ToolCall(0, arguments='{"a"'), tokens=[4]),
    Delta(tool_call=ToolCall(0, arguments=":1}"), tokens=[4]),
    Delta(tool_call=ToolCall(1, "call_b", "edit", "some text", custom=True), tokens=[5]),
    Delta(finish="stop", tokens=[6]),
]


def kinds_of(events: list[Any]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_events_come_in_openais_order():
    events = streamed(writer(), ALL_KINDS)
    assert kinds_of(events) == EXPECTED
    final = check_stream(events)
    assert final["status"] == "completed"
    assert final["usage"]["output_tokens"] == 9
    assert final["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}
    call, custom = final["output"][2:]
    assert (call["call_id"], call["name"], call["arguments"]) == ("call_a", "f", '{"a":1}')
    assert (custom["call_id"], custom["name"], custom["input"]) == ("call_b", "edit", "some text")


def test_a_summary_is_streamed_beside_the_reasoning():
    events = streamed(writer(summary=True), ALL_KINDS)
    mine = [kind for kind in kinds_of(events) if "reasoning" in kind]
    assert mine == [
        "reasoning_summary_part.added",
        "reasoning_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_text.delta",
        "reasoning_summary_text.delta",
        "reasoning_text.done",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
    ]
    (reasoning, *_) = check_stream(events)["output"]
    assert reasoning["summary"][0]["text"] == reasoning["content"][0]["text"] == "Let me see."


def test_an_answer_cut_short_is_incomplete_and_so_is_its_last_item():
    for count in range(1, 7):
        final = check_stream(streamed(writer(), [*ALL_KINDS[:count], Delta(finish="length")]))
        assert final["status"] == "incomplete"
        assert final["incomplete_details"] == {"reason": "max_output_tokens"}
        assert final["output"][-1]["status"] == "incomplete"
        assert all(item["status"] == "completed" for item in final["output"][:-1])


def test_an_empty_answer_is_an_empty_message():
    final = check_stream(streamed(writer(), [Delta(finish="stop", tokens=[1])]))
    assert [part["text"] for item in final["output"] for part in item["content"]] == [""]
    assert check_stream(streamed(writer(), [Delta(finish="length")]))["output"] == []


def test_a_failure_says_so_twice():
    made = writer()
    data = made.opening() + b"".join(map(made.events, ALL_KINDS[:3]))
    events = parse_events(data + made.error(GenerationError("NaN in the logits")))
    assert kinds_of(events)[-2:] == ["failed", "error"]
    final = check_stream(events[:-1])
    assert (final["status"], final["error"]["code"]) == ("failed", "server_error")
    assert final["error"]["message"] == "NaN in the logits"
    assert final["output"][-1]["status"] == "incomplete"
    assert events[-1]["error"]["code"] == events[-1]["code"] == "generation_failed"


def test_in_the_background_it_waits_first():
    made = writer(background=True)
    events = parse_events(made.opening() + made.events(ALL_KINDS[0]))
    assert kinds_of(events)[:3] == ["created", "queued", "in_progress"]
    assert [event["response"]["status"] for event in events[:3]] == [
        "queued",
        "queued",
        "in_progress",
    ]


def test_log_probabilities_belong_to_the_text_and_to_nothing_else():
    def scored(number: int, **what: Any) -> Delta:
        return Delta(**what, tokens=[number], logprobs=[fake_logprobs(number, 1)])

    call = ToolCall(0, "call_a", "f", "{}")
    deltas = [
        scored(97, reasoning="a", num_reasoning=1),
        scored(98),  # the end of the reasoning, whose text nobody sees
        scored(99, text=""),  # held back
        scored(100, text="cd"),
        scored(101, tool_call=call),
        scored(102, finish="stop"),
    ]
    final = check_stream(streamed(writer(logprobs=True), deltas))
    told = final["output"][1]["content"][0]["logprobs"]
    assert [entry["token"] for entry in told] == ["b", "c", "d"]
    assert whole(writer(), deltas)["output"][1]["content"][0]["logprobs"] == []


def test_log_probabilities_without_end_are_not_told_four_times(monkeypatch):
    monkeypatch.setattr(output, "MOST_REPEATED", 100)
    deltas = [Delta(text="a", tokens=[97], logprobs=[fake_logprobs(97, 5)]), Delta(finish="stop")]
    data = writer(logprobs=True)
    events = parse_events(data.opening() + b"".join(map(data.events, deltas)) + data.closing())
    ended = {event["type"]: event for event in events}
    assert ended["response.output_text.done"]["logprobs"] == []
    (item,) = ended["response.completed"]["response"]["output"]
    assert item == ended["response.output_item.done"]["item"]
    assert len(item["content"][0]["logprobs"]) == 1


def test_calls_beyond_the_most_that_are_wanted_are_left_out():
    final = check_stream(streamed(writer(max_tool_calls=1), ALL_KINDS))
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call"]


def test_a_tool_of_a_namespace_gets_both_its_names():
    names = {"files__read": ("files", "read")}
    call = Delta(tool_call=ToolCall(0, "call_a", "files__read", "{}"))
    (item,) = check_stream(streamed(writer(names=names), [call, Delta(finish="stop")]))["output"]
    assert (item["namespace"], item["name"]) == ("files", "read")


@pytest.mark.parametrize("stream", [False, True])
def test_it_is_kept_before_the_client_knows_that_it_has_ended(stream):
    kept: list[str] = []
    made = ResponsesWriter(
        "resp_1", FIELDS, Shape(), JOB, TOKENIZER, keep=lambda one: kept.append(one.status)
    )
    made.opening()
    for delta in ALL_KINDS:
        made.events(delta)
        assert kept == []
    if stream:
        made.closing()
    else:
        made.result()
    assert kept == ["completed"]
