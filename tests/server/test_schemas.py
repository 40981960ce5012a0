"""From bytes to requests, without a server."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import orjson
import pytest
from pydantic import ValidationError

from ruvon.errors import RequestError
from ruvon.server import shape
from ruvon.server.embeddings import EmbeddingRequest
from ruvon.server.messages_api.schemas import MessagesRequest, ThinkingParam
from ruvon.server.ollama import Options as OllamaOptions
from ruvon.server.parsing import MAX_IGNORED, load, parse
from ruvon.server.responses_api.schemas import ResponsesRequest
from ruvon.server.schemas import ChatRequest, CompletionRequest
from ruvon.server.shape import Bounds, check_shape

BOUNDS = Bounds(values=1000, keys=200, containers=100, escapes=50)
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def chat(**fields):
    return parse(ChatRequest, CHAT | fields)


@pytest.mark.parametrize("name", sorted(ChatRequest.model_fields.keys() - {"messages"}))
def test_null_means_not_given(name):
    request, ignored = chat(**{name: None})
    assert getattr(request, name) is None
    assert ignored == []


def test_types_are_strict():
    for fields in ({"n": True}, {"n": 1.5}, {"n": "1"}, {"stream": 1}, {"stop": [1]}):
        with pytest.raises(RequestError) as error:
            chat(**fields)
        assert error.value.code == "invalid_type"
    request, _ = chat(temperature=1, stop="x", seed=-(2**63))
    assert (request.temperature, request.stop, request.seed) == (1.0, ["x"], -(2**63))


def integers(model):
    """The names of a model's fields that hold an integer."""
    for name, spec in model.model_json_schema()["properties"].items():
        if {"integer"} & {kind.get("type") for kind in spec.get("anyOf", [spec])}:
            yield name


REQUESTS = [
    ChatRequest, CompletionRequest, MessagesRequest, ThinkingParam, ResponsesRequest,
    EmbeddingRequest, OllamaOptions,
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name"), [(model, name) for model in REQUESTS for name in integers(model)]
)
def test_whole_numbers_may_have_a_point(model, name):
    """As Gson, Lua and Julia write them. What does not fit into 64 bits cannot be sent back."""
    for value, wrong in ((2.0, False), (2.5, True), (1e30, True)):
        with pytest.raises(ValidationError) as error:
            model.model_validate({name: value, "temperature": "no"})
        found = [each["type"] for each in error.value.errors() if each["loc"] == (name,)]
        assert found == (["int_type"] if wrong else [])


def test_numbers_must_be_finite():
    for number in (b"NaN", b"Infinity", b"1e999"):
        with pytest.raises(RequestError) as error:
            load(b'{"prompt": "a", "temperature": %s}' % number, BOUNDS)
        assert error.value.code == "invalid_json"


@pytest.mark.parametrize("collects", [True, False])
@pytest.mark.parametrize("end", ["", "{"])
def test_a_large_body_leaves_the_garbage_collector_as_it_was(collects, end):
    body, before = orjson.dumps({"prompt": "a" * 9000}) + end.encode(), gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        with pytest.raises(RequestError) if end else nullcontext():
            load(body, BOUNDS)
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


def test_nested_names_are_reported():
    _, ignored = chat(stream=True, stream_options={"include_obfuscation": True}, store=True)
    assert sorted(ignored) == ["store", "stream_options.include_obfuscation"]


def test_reports_are_bounded():
    _, ignored = chat(**{f"x{i}" * 100: 1 for i in range(100)})
    assert len(ignored) == MAX_IGNORED
    assert all(len(name) <= 100 for name in ignored)


def test_a_million_mistakes_cost_one_error():
    with pytest.raises(RequestError) as error:
        chat(messages=[1] * 8000)
    assert "more)" not in error.value.message
    assert error.value.param == "messages[0]"


def test_several_mistakes_are_counted():
    with pytest.raises(RequestError, match=r"\(and 1 more\)"):
        chat(n=0, top_p=2)


@pytest.mark.parametrize("value", [[], {}, 5, [[]], [True], [[1], "a", 2], [None]])
def test_prompts_of_no_known_shape(value):
    with pytest.raises(RequestError) as error:
        parse(CompletionRequest, {"prompt": value})
    assert error.value.param == "prompt"


@pytest.mark.parametrize(
    ("bulk", "what"),
    [
        (b"1," * 999, None),
        (b"1," * 1001, "1000 values"),
        (b"[]," * 99, None),
        (b"[]," * 101, "100 lists and objects"),
        (b"{}," * 101, "100 lists and objects"),
        (b'"a":1,' * 200, None),
        (b'"a":1,' * 201, "200 keys"),
        (rb'"\n\n\n\n\n",' * 10, None),
        (rb'"\n\n\n\n\n",' * 11, "50 escapes"),
        (b'"' + b",[{:" * 30_000 + b'"', None),  # text that looks like structure
        (rb'"\"[[",' * 25, None),
        (rb'"\\",[],' * 25, None),
        (rb'"\\",[[[[[]]]]],' * 25, "100 lists and objects"),
    ],
)
def test_what_a_body_holds_is_counted_outside_of_strings(bulk, what):
    if what is None:
        check_shape(b"[" + bulk + b"1]", BOUNDS)
    else:
        with pytest.raises(RequestError, match=f"more than {what}") as error:
            check_shape(b"[" + bulk + b"1]", BOUNDS)
        assert error.value.code == "too_large"


@pytest.mark.parametrize("shift", range(12))
def test_slices_may_cut_anywhere(monkeypatch, shift):
    """Each text is counted alike, whether or not a slice ends within its escapes."""
    monkeypatch.setattr(shape, "SLICE", 7)
    body = b" " * shift + rb'{"a\\\"[": ["\\", "x\\\\", {"\"": "[,"}], "b": "\u005b,"}'
    assert orjson.loads(body)
    outside = b"".join(part for part, _ in shape.slices(body)).strip()
    assert outside == b"{: [, , {: }], : }"


@pytest.mark.parametrize("size", range(1, 9))
def test_backslashes_without_end(monkeypatch, size):
    monkeypatch.setattr(shape, "SLICE", size)
    assert list(shape.slices(b"\\" * 99 + b'"'))
