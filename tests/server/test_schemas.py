"""From bytes to requests, without a server."""

from __future__ import annotations

import orjson
import pytest

from ruvon.errors import RequestError
from ruvon.server.parsing import MAX_IGNORED, parse
from ruvon.server.schemas import ChatRequest, CompletionRequest

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def chat(**fields):
    return parse(ChatRequest, orjson.dumps(CHAT | fields))


@pytest.mark.parametrize("name", sorted(ChatRequest.model_fields.keys() - {"messages"}))
def test_null_means_not_given(name):
    request, ignored = chat(**{name: None})
    assert getattr(request, name) is None
    assert ignored == []


def test_types_are_strict():
    for fields in ({"n": True}, {"n": 1.0}, {"n": "1"}, {"stream": 1}, {"stop": [1]}):
        with pytest.raises(RequestError) as error:
            chat(**fields)
        assert error.value.code == "invalid_type"
    request, _ = chat(temperature=1, stop="x", seed=-(2**63))
    assert (request.temperature, request.stop, request.seed) == (1.0, ["x"], -(2**63))


def test_numbers_must_be_finite():
    with pytest.raises(RequestError, match="finite"):
        parse(CompletionRequest, b'{"prompt": "a", "temperature": NaN}')


def test_nested_names_are_reported():
    _, ignored = chat(stream=True, stream_options={"include_obfuscation": True}, store=True)
    assert sorted(ignored) == ["store", "stream_options.include_obfuscation"]


def test_reports_are_bounded():
    _, ignored = chat(**{f"x{i}" * 100: 1 for i in range(100)})
    assert len(ignored) == MAX_IGNORED
    assert all(len(name) <= 100 for name in ignored)


def test_a_million_mistakes_cost_one_error():
    with pytest.raises(RequestError) as error:
        parse(ChatRequest, b'{"messages": [' + b"1," * 200_000 + b"1]}")
    assert "more)" not in error.value.message
    assert error.value.param == "messages[0]"


def test_several_mistakes_are_counted():
    with pytest.raises(RequestError, match=r"\(and 1 more\)"):
        chat(n=0, top_p=2)


@pytest.mark.parametrize("value", [[], {}, 5, [[]], [True], [[1], "a", 2], [None]])
def test_prompts_of_no_known_shape(value):
    with pytest.raises(RequestError) as error:
        parse(CompletionRequest, orjson.dumps({"prompt": value}))
    assert error.value.param == "prompt"
