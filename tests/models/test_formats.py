"""Calls and reasoning out of ids, however they are cut; every format, all the ways to go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from families import FAMILIES, TOOLS
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvon.deltas import Delta
from ruvon.models.formats.tools import Tool, ToolChoice, Turn

USER = {"role": "user", "content": "Hi"}


def ask(family: str, tools: Sequence[Tool] = TOOLS, **options: Any) -> Turn:
    return FAMILIES[family].chat.turn([USER], tools=tools, **options)


def encode(family: str, text: str) -> list[int]:
    """As the model writes it: markers are tokens where there are such tokens."""
    tokenizer = FAMILIES[family].tokenizer
    return tokenizer.encode(text, add_special_tokens=False, parse_special=True)


def read(
    family: str, chunks: Sequence[Sequence[int]], turn: Turn | None = None, **options: Any
) -> list[Delta]:
    turn = turn or ask(family)
    text = FAMILIES[family].tokenizer.stream(prompt_ids=turn.prompt, **options)
    parser = turn.parser(text)
    return [delta for chunk in chunks for delta in parser.push(chunk)] + parser.finish()


def assembled(deltas: Sequence[Delta]) -> dict[str, Any]:
    """What a client makes of deltas."""
    calls: list[list[Any]] = []
    for call in (delta.tool_call for delta in deltas if delta.tool_call is not None):
        if call.id is not None:
            assert call.index == len(calls)
            calls.append([call.name, "", call.custom])
        assert call.index == len(calls) - 1
        assert (call.id is None) == (call.name is None)
        assert call.custom == calls[-1][2]
        calls[-1][1] += call.arguments
    assert all(call[1].encode() is not None for call in calls)  # there are no halves of characters
    return {
        "text": "".join(delta.text for delta in deltas),
        "reasoning": "".join(delta.reasoning for delta in deltas),
        "calls": [tuple(call[:2]) for call in calls],
        "num_reasoning": sum(delta.num_reasoning for delta in deltas),
    }


def said(family: str, text: str, turn: Turn | None = None) -> dict[str, Any]:
    return assembled(read(family, [encode(family, text)], turn))


ROME = '{"city": "Róma {\\"}", "days": 3}'
WAYS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>',
    "hermes in words": '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>',
    "smollm": '<tool_call>[{"name": "weather", "arguments": %s}]</tool_call>',
    "thinking": '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>',
    "llama": '<|python_tag|>{"name": "weather", "parameters": %s}',
    "mistral": '[TOOL_CALLS] [{"name": "weather", "arguments": %s}]',
    "mistral named": "[TOOL_CALLS]weather[ARGS]%s",
    "untaught": '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>',
}
CODED = (
    '<tool_call>\n<function=weather>\n<parameter=city>\nRóma {"}\n</parameter>\n'
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
)


def written(family: str) -> str:
    return CODED if family == "coder" else WAYS.get(family, WAYS["hermes"]) % ROME


# What is read


@pytest.mark.parametrize("family", WAYS | {"coder": ""})
def test_each_format_is_found_by_its_template_and_read(family):
    call = ("weather", ROME)
    assert said(family, written(family))["calls"] == [call]
    result = said(family, f"Let me see.\n\n{written(family)}\n{written(family)}\n")
    assert result["calls"] == [call, call]
    assert result["text"] == "Let me see."


@pytest.mark.parametrize(
    ("family", "text", "calls", "rest"),
    [
        ("llama", '{"name": "weather", "parameters": {"city": "a"}}', ['{"city": "a"}'], ""),
        (
            "llama",
            '{"type": "function", "name": "anything", "parameters": {}}; {"name": "weather",'
            ' "parameters": {"days": 1}}',
            ["{}", '{"days": 1}'],
            "",
        ),
        ("llama", '{"weather": "fine"}', [], '{"weather": "fine"}'),
        ("llama", '<|python_tag|>brave_search.call(query="x")', [], None),
        ("llama", ' {"name": "nobody", "parameters": {}}', [], None),
        ("hermes", '<tool_call>{"arguments": {"a": [1]}, "name": "anything"}', ['{"a": [1]}'], ""),
        ("hermes", '<tool_call>{"name": "anything"}</tool_call>', ["{}"], ""),
        ("hermes", '<tool_call>{"name": "anything", "arguments": null}', ["{}"], ""),
        ("hermes", '<tool_call>{"name": "anything", "arguments": "{\\"a\\":1}"}', ['{"a":1}'], ""),
        ("hermes", '<tool_call>{"name": "anything", "arguments": {}</tool_call>.', ["{}"], "."),
        ("hermes", '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', [], None),
        ("hermes", "<tool_call> is a tag", [], None),
        ("hermes", '<tool_call>{"name": "weather", "arg', [], None),
        ("hermes in words", '<tool_call>{"name": "anything"}\n</tool_', ["{}"], ""),
        ("hermes", "a <tool_call", [], None),
        ("hermes", '{"name": "weather", "arguments": {}}', [], None),
        ("hermes", '<tool_call>{"name": "anything", "arguments": {"a": [}', ['{"a": [}'], ""),
        (
            "mistral",
            '[TOOL_CALLS][{"name": "anything", "arguments": {}, "id": "012345678"},'
            ' {"name": "weather", "arguments": {"days": 2}}]',
            ["{}", '{"days": 2}'],
            "",
        ),
        ("mistral named", "ok[TOOL_CALLS]nobody[ARGS]{}", [], None),
        ("coder", "<function=anything>\n</function>", ["{}"], ""),
        ("coder", "<function=weather>\n<parameter=city>\nRó", ['{"city": "Ró'], ""),
        ("coder", "<function=weather><parameter=city>1\n2</parameter>", ['{"city": "1\\n2"}'], ""),
        ("coder", "<tool_call>\n<function=nobody>", [], None),
    ],
)  # fmt: skip
def test_what_models_write_besides(family, text, calls, rest):
    """``rest`` is what stays text; None means all of it."""
    result = said(family, text)
    assert [arguments for _, arguments in result["calls"]] == calls
    assert result["text"] == (text if rest is None else rest)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (
            "hermes",
            '<tool_call>{"name": "patch", "arguments": {"input": "a\\n\\"b\\""}}</tool_call>',
        ),
        ("hermes", '<tool_call>{"name": "patch", "arguments": "a\\n\\"b\\""}</tool_call>'),
        (
            "hermes",
            '<tool_call>{"arguments": {"input": "a\\n\\"b\\""}, "name": "patch"}</tool_call>',
        ),
        (
            "hermes",
            '<tool_call>{"name": "patch", "arguments": {"input": "\\u0061\n\\"b\\"", "x": 1}}',
        ),
        ("coder", '<function=patch>\n<parameter=input>\na\n"b"\n</parameter>\n</function>'),
    ],
)
def test_a_custom_tools_input_is_its_text(family, text):
    (first, *_) = deltas = read(family, [encode(family, text)])
    assert first.tool_call.custom
    assert assembled(deltas)["calls"] == [("patch", 'a\n"b"')]


def test_a_call_goes_out_as_it_is_written():
    ids = encode("hermes", written("hermes"))
    deltas = read("hermes", [[id] for id in ids])
    first, *others = [delta.tool_call for delta in deltas]
    assert (first.index, first.name, first.arguments) == (0, "weather", "")
    assert first.id.startswith("call_")
    assert len(first.id) == 29
    assert len(others) > 5
    assert {(call.index, call.id, call.name) for call in others} == {(0, None, None)}


def test_a_custom_tools_input_goes_out_as_it_is_written():
    text = (
        '<tool_call>{"name": "patch", "arguments": {"input": "one \\ud83d\\ude42 \\q\\ud83d two"}}'
    )
    deltas = read("hermes", [[id] for id in encode("hermes", text)])
    assert len(deltas) > 5
    assert assembled(deltas)["calls"] == [("patch", "one 🙂 \\q\ufffd\ufffd\ufffd two")]


def test_ids_of_calls_differ():
    text = written("hermes") * 3
    calls = [delta.tool_call for delta in read("hermes", [encode("hermes", text)])]
    assert len({call.id for call in calls if call.id is not None}) == 3


# However the ids are cut

MARKERS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]",
    "<|python_tag|>", "<function=", "<parameter=", "</parameter>", "</function>",
]  # fmt: skip
PIECES = [
    *MARKERS, "<tool_", "<tool_call><tool_call>", "</thi", "[", "]", "{", "}", '"', "\\", ",", ":",
    ";", "\n", "  ", "x", "é", "日本", "🙂", "null", "weather", "patch", '"name"', '"arguments"',
    '{"name": "weather", "arguments": ', '{"name": "anything", "parameters": {', '{"a": "}',
    '{"name": "patch", "arguments": {"input": "\\u00e9\\ud83d\\ude42 \\n"}}', "\\ud83d",
    "\\u00", "\\n", '<tool_call>{"name": "patch", "arguments": {"input": "', "function=weather>",
    "weather[ARGS]{", "parameter=days>", '[{"name": "anything"}', ROME, CODED, *WAYS.values(),
    *(way % ROME for way in WAYS.values()),
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[int], list[list[int]]]:
    """A family, the ids of a text, and the same in pieces; markers are tokens, or spelled."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    parse = draw(st.booleans())
    tokenizer = FAMILIES[family].tokenizer
    ids = tokenizer.encode(draw(TEXTS), add_special_tokens=False, parse_special=parse)
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    pieces = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    return family, ids, pieces


@settings(deadline=None, max_examples=150)
@given(cut_texts(), st.booleans(), st.sampled_from([(), ("}",), ("x", "call>")]))
def test_however_ids_are_cut_the_deltas_add_up_to_the_same(cut, parallel, stop):
    family, ids, pieces = cut
    turn = ask(family, choice=ToolChoice(parallel=parallel))
    whole, parts, single = (
        assembled(read(family, chunks, turn, stop=stop))
        for chunks in ([ids], pieces, [[id] for id in ids])
    )
    assert whole == parts == single
    assert len(whole["calls"]) <= 1 or parallel
    assert 0 <= whole["num_reasoning"] <= len(ids)


@settings(deadline=None, max_examples=60)
@given(cut_texts())
def test_what_is_no_call_is_text(cut):
    """With tools of which no call speaks, all that was written can be read."""
    family, ids, pieces = cut
    turn = ask(family, [Tool("nobody")])
    result = assembled(read(family, pieces, turn))
    shown = FAMILIES[family].tokenizer.decode(ids, skip_special_tokens=False)
    assert result["calls"] == []
    if family not in ("thinking", "opened"):
        assert result["text"] == shown
