"""What a request says its answer must be, what may be called, and how much is thought about it."""

from __future__ import annotations

from typing import Any

import pytest

from ruvon import grammars
from ruvon.errors import RequestError
from ruvon.models.formats.tools import Reasoning, ToolChoice
from ruvon.server.chat import chat_of
from ruvon.server.constraints import grammar_of
from ruvon.server.parsing import parse
from ruvon.server.schemas import ChatRequest, CompletionRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": False}}
CUSTOM = {"type": "custom", "custom": {"name": "c", "description": "Patch."}}
TOOLS = [FUNCTION, CUSTOM]


def chat(**fields: Any) -> Any:
    messages = [{"role": "user", "content": "Hi"}]
    return chat_of(parse(ChatRequest, {"messages": messages} | fields)[0])


def wrong(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as error:
        chat(**fields)
    return error.value


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, grammars.json_object()),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, SCHEMA),
        ({"response_format": FORMAT}, SCHEMA),
        ({"response_format": {"type": "regex", "regex": "a+"}}, grammars.regex("a+")),
        ({"response_format": {"type": "choice", "choice": ["a"]}}, grammars.choice(["a"])),
        ({"structured_outputs": {"json": SCHEMA}}, SCHEMA),
        ({"structured_outputs": {"json": '{"type":"null"}'}}, {"type": "null"}),
        ({"structured_outputs": {"json_object": True}}, grammars.json_object()),
        ({"structured_outputs": {"json_object": False}}, None),
        (
            {
                "structured_outputs": {
                    "regex": "a",
                    "disable_any_whitespace": False,
                    "disable_additional_properties": False,
                }
            },
            grammars.regex("a"),
        ),
        ({"structured_outputs": {"regex": "a+"}}, grammars.regex("a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, grammars.choice(["a", "b"])),
        ({"structured_outputs": {"grammar": "start: /a/"}}, grammars.lark("start: /a/")),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, grammars.gbnf('root ::= "a"')),
        ({"guided_json": SCHEMA}, SCHEMA),
        ({"guided_json": "true"}, True),
        ({"guided_regex": "a+"}, grammars.regex("a+")),
        ({"guided_choice": ["a"]}, grammars.choice(["a"])),
        ({"guided_grammar": "start: /a/"}, grammars.lark("start: /a/")),
        ({"json_schema": SCHEMA}, SCHEMA),
        ({"regex": "a+"}, grammars.regex("a+")),
        ({"ebnf": 'root ::= "a"'}, grammars.gbnf('root ::= "a"')),
        ({"grammar": 'root ::= "a"'}, grammars.gbnf('root ::= "a"')),
    ],
)
def test_every_name_for_a_constraint(fields, wanted):
    if isinstance(wanted, dict | bool):
        wanted = grammars.json_schema(wanted)
    lark = wanted and wanted.lark()
    response = chat(**fields).response
    assert (response and response.lark()) == lark
    completion = grammar_of(parse(CompletionRequest, {"prompt": "Hi"} | fields)[0])
    assert (completion and completion.lark()) == lark


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": FORMAT | {"json_schema": {"schema": SCHEMA, "name": "a b"}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": {"type": "regex"}}, "response_format.regex"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1]"),
        ({"guided_regex": ""}, "guided_regex"),
    ],
)
def test_a_constraint_that_makes_no_sense_is_named(fields, param):
    assert wrong(**fields).param == param


def test_strict_schemas_keep_openais_rules():
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    error = wrong(response_format=format)
    assert error.param == "response_format.json_schema.schema"
    assert "additionalProperties" in error.message


def test_two_constraints_are_both_named():
    error = wrong(response_format=FORMAT, guided_regex="a")
    assert error.param == "guided_regex"
    assert "'response_format.json_schema.schema' and 'guided_regex'" in error.message
    error = wrong(structured_outputs={"regex": "a", "choice": ["a"]})
    assert "structured_outputs.regex" in error.message
    assert "structured_outputs.choice" in error.message


def test_tools_as_formats_take_them():
    regex = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "a+"}}
    constrained = {"type": "custom", "custom": {"name": "d", "format": regex}}
    f, c, d = chat(tools=[*TOOLS, constrained]).tools
    assert (f.name, f.parameters, f.strict, f.custom) == ("f", SCHEMA, False, False)
    assert (c.name, c.description, c.custom, c.syntax) == ("c", "Patch.", True, None)
    assert d.syntax.lark() == grammars.regex("a+").lark()
    assert (f.param, c.param) == ("tools[0].function.parameters", "tools[1].custom")


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (None, ToolChoice()),
        ("none", ToolChoice("none")),
        ("auto", ToolChoice("auto")),
        ("required", ToolChoice("required")),
        ({"type": "function", "function": {"name": "f"}}, ToolChoice("required", ("f",), False)),
        ({"type": "custom", "custom": {"name": "c"}}, ToolChoice("required", ("c",), False)),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": TOOLS[:1]}},
            ToolChoice("auto", ("f",)),
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": TOOLS}},
            ToolChoice("required", ("f", "c")),
        ),
    ],
)
def test_every_choice(asked, wanted):
    assert chat(tools=TOOLS, tool_choice=asked).choice == wanted


def test_calls_one_at_a_time():
    assert not chat(tools=TOOLS, parallel_tool_calls=False).choice.parallel
    assert not chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False).choice.parallel


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [FUNCTION, {"type": "custom"}]}, "tools[1].custom"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [FUNCTION, FUNCTION]}, "tools[1]"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": SCHEMA, "strict": True},
                    }
                ]
            },
            "tools[0].function.parameters",
        ),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
        (
            {
                "tools": [
                    {
                        "type": "custom",
                        "custom": {"name": "c", "format": {"type": "grammar"}},
                    }
                ]
            },
            "tools[0].custom.format.grammar",
        ),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        (
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "", "function_call": {"name": "f"}},
                ]
            },
            "messages[1].function_call",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]},
            "messages[0].tool_calls[0].custom",
        ),
    ],
)
def test_tools_that_make_no_sense_are_named(fields, param):
    assert wrong(**fields).param == param


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, Reasoning()),
        ({"reasoning_effort": "high"}, Reasoning(effort="high")),
        ({"reasoning_effort": "none"}, Reasoning(effort="none")),
        ({"enable_thinking": False}, Reasoning(enabled=False)),
        ({"thinking_token_budget": 7}, Reasoning(budget=7)),
        ({"thinking_budget": 0}, Reasoning(budget=0)),
        ({"reasoning_budget": -1}, Reasoning()),
    ],
)
def test_how_much_to_think(fields, wanted):
    assert chat(**fields).reasoning == wanted


def test_two_budgets_are_both_named():
    error = wrong(thinking_budget=1, reasoning_budget=2)
    assert error.param == "reasoning_budget"
    assert "thinking_budget" in error.message


def test_past_calls_reach_the_format_as_they_were_made():
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "2", "type": "custom", "custom": {"name": "c", "input": "text"}},
    ]
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    asked = chat(
        messages=[
            {"role": "assistant", "content": None, "tool_calls": calls, "reasoning": "hm"},
            {"role": "tool", "tool_call_id": "1", "content": parts},
        ]
    )
    assert asked.messages == [
        {"role": "assistant", "content": "", "tool_calls": calls, "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": "4\n2"},
    ]
