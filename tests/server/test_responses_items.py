"""Items and tools: what the model is told of them, what is stored, what is refused by name."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from ruvon.errors import RequestError
from ruvon.models.formats.tools import ToolChoice
from ruvon.server.parsing import parse
from ruvon.server.responses_api.items import SUMMARY
from ruvon.server.responses_api.prepare import Context, all_items, keep, transcribe
from ruvon.server.responses_api.schemas import ResponsesRequest
from ruvon.server.responses_api.store import StoredItem
from ruvon.server.responses_api.tools import Toolbox, tool_choice, toolbox
from ruvon.server.sealed import seal, unseal

LISTED: TypeAdapter[Any] = TypeAdapter(ResponseItem)


def request(**fields: Any) -> ResponsesRequest:
    return parse(ResponsesRequest, {"input": "Hi", **fields})[0]


def messages(*items: Any, **fields: Any) -> list[dict[str, Any]]:
    asked = request(input=list(items), **fields)
    return transcribe(asked, all_items(asked, Context())).messages


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"type": "function_call", "call_id": "call_a", "name": "f", "arguments": '{"a":1}'}
CALLED = {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
EDIT = {"type": "custom_tool_call", "call_id": "call_b", "name": "edit", "input": "*** Begin"}
EDITED = {"id": "call_b", "type": "custom", "custom": {"name": "edit", "input": "*** Begin"}}


def test_a_text_is_a_message_of_the_user():
    asked = request(input="Hi", instructions="Be brief.")
    assert transcribe(asked, all_items(asked, Context())).messages == [
        said("system", "Be brief."),
        said("user", "Hi"),
    ]


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ({"role": "user", "content": "a"}, said("user", "a")),
        ({"type": "message", "role": "developer", "content": "a"}, said("developer", "a")),
        (
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "a"},
                    {"type": "input_text", "text": "b"},
                ],
            },
            said("user", "a\nb"),
        ),
        (
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "a", "logprobs": []}],
            },
            said("assistant", "a"),
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
            said("assistant", "No."),
        ),
        (CALL, said("assistant", "", tool_calls=[CALLED])),
        (EDIT, said("assistant", "", tool_calls=[EDITED])),
        (
            {"type": "function_call_output", "call_id": "x", "output": "4"},
            said("tool", "4", tool_call_id="x"),
        ),
        (
            {
                "type": "custom_tool_call_output",
                "call_id": "x",
                "output": [{"type": "input_text", "text": "4"}],
            },
            said("tool", "4", tool_call_id="x"),
        ),
        (
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "a"}]},
            said("assistant", "", reasoning_content="a"),
        ),
        (
            {"type": "reasoning", "summary": [], "encrypted_content": seal("äh")},
            said("assistant", "", reasoning_content="äh"),
        ),
        (
            {"type": "compaction", "encrypted_content": seal("We spoke.")},
            said("system", SUMMARY + "We spoke."),
        ),
    ],
)
def test_items_are_messages(item, told):
    assert messages(item) == [told]


def test_what_a_model_says_in_one_turn_is_one_message():
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}
    spoken = {"role": "assistant", "content": "I call."}
    results = [
        {"type": "function_call_output", "call_id": "call_a", "output": "1"},
        {"type": "custom_tool_call_output", "call_id": "call_b", "output": "2"},
    ]
    turn = [thought, spoken, CALL, EDIT]
    told = said("assistant", "I call.", reasoning_content="Hm.", tool_calls=[CALLED, EDITED])
    answers = [
        said("tool", "1", tool_call_id="call_a", name="f"),
        said("tool", "2", tool_call_id="call_b", name="edit"),
    ]
    start = {"role": "user", "content": "Go"}
    assert messages(start, *turn, *results, *turn) == [said("user", "Go"), told, *answers, told]
    assert messages(spoken, spoken) == [said("assistant", "I call.")] * 2
    assert messages(CALL, thought, CALL) == [
        said("assistant", "", tool_calls=[CALLED]),
        said("assistant", "", reasoning_content="Hm.", tool_calls=[CALLED]),
    ]


def test_a_call_into_a_namespace_has_the_name_that_the_model_knows():
    result = {"type": "function_call_output", "call_id": "call_a", "output": "1"}
    call, answer = messages(CALL | {"namespace": "mcp__files__"}, result)
    assert call["tool_calls"][0]["function"]["name"] == answer["name"] == "mcp__files__f"


def test_what_nobody_knows_is_skipped_and_named():
    items = [
        {"type": "web_search_call", "id": "ws_1", "action": {"type": "search", "content": 7}},
        {"type": "agent_message", "content": 7},
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"},
    ]
    asked = request(input=items)
    transcript = transcribe(asked, all_items(asked, Context()))
    assert transcript.messages == [said("user", "Hi")]
    assert transcript.skipped == [
        "input[0].web_search_call",
        "input[1].agent_message",
        "input[3].encrypted_content",
    ]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "user", "content": [{"type": "input_image"}]}, "input[0].content[0]"),
        ({"role": "user", "content": [{"type": "input_file"}]}, "input[0].content[0]"),
        ({"role": "user", "content": [{"type": "input_text"}]}, "input[0].content[0].text"),
        ({"role": "user", "content": 7}, "input[0].content"),
        ({"role": "boss", "content": "a"}, "input[0].role"),
        ({"role": "user"}, "input[0].content"),
        ({"type": "function_call", "name": "f", "arguments": "{}"}, "input[0].call_id"),
        ({"type": "function_call_output", "call_id": "x", "output": {}}, "input[0].output"),
        ({"type": "item_reference", "id": "msg_1"}, "input[0].id"),
        ({"id": "msg_1"}, "input[0].id"),
        ({"type": "compaction", "encrypted_content": "gAAAA"}, "input[0].encrypted_content"),
        ({"type": "compaction_trigger"}, "input[0]"),
        ({"type": 7}, "input[0].type"),
        ("Hi", "input[0]"),
        (None, "input[0]"),
    ],
)
def test_what_cannot_be_read_is_named(item, param):
    with pytest.raises(RequestError) as wrong:
        messages(item)
    assert wrong.value.param == param


def test_what_is_stored_is_what_is_listed_and_reads_the_same():
    items = [
        {"role": "user", "content": "a", "id": "msg_mine"},
        {"role": "assistant", "content": "b"},
        {"type": "reasoning", "summary": [], "encrypted_content": seal("c")},
        CALL | {"namespace": "n"},
        {"type": "function_call_output", "call_id": "call_a", "output": "1"},
        EDIT,
        {
            "type": "custom_tool_call_output",
            "call_id": "call_b",
            "output": [{"type": "input_text", "text": "2"}],
        },
        {"type": "mcp_call", "id": "mcp_1"},
        {"type": "compaction", "encrypted_content": seal("d")},
    ]
    asked = request(input=items)
    kept = list(keep(all_items(asked, Context())))
    assert kept[0].id == "msg_mine"
    assert len(kept) == len(items) - 1
    for item in kept:
        listed = LISTED.validate_json(item.json)
        assert listed.id == item.id
        assert listed.type == orjson.loads(item.json)["type"]
    later = Context(history=tuple(kept))
    again = request(input="e")
    before = transcribe(asked, all_items(asked, Context())).messages
    assert transcribe(again, all_items(again, later)).messages == [*before, said("user", "e")]


@pytest.mark.parametrize("output", ["1", [{"type": "input_text", "text": "1"}]])
def test_an_output_is_listed_in_the_form_in_which_it_came(output):
    call = {"type": "function_call_output", "call_id": "call_a", "output": output}
    (item,) = keep(all_items(request(input=[call]), Context()))
    assert orjson.loads(item.json)["output"] == output


def test_references_stand_for_stored_items():
    item = StoredItem("msg_1", orjson.dumps({"role": "user", "content": "a", "id": "msg_1"}))
    asked = request(input=[{"type": "item_reference", "id": "msg_1"}, {"id": "msg_1"}])
    found = Context(referenced={item.id: item.json})
    assert transcribe(asked, all_items(asked, found)).messages == [said("user", "a")] * 2


@pytest.mark.parametrize("text", ["", "äöü", "x" * 1000])
def test_what_is_sealed_comes_back(text):
    assert unseal(seal(text)) == text
    for broken in (seal(text)[1:], seal(text) + "!", "ruvon-plain-1:/w==", ""):
        assert unseal(broken) is None


# ---------------------------------------------------------------------- tools

FUNCTION = {"type": "function", "name": "f", "parameters": {"type": "object"}}
CUSTOM = {
    "type": "custom",
    "name": "edit",
    "format": {"type": "grammar", "syntax": "regex", "definition": "[a-z]+"},
}
GROUP = {
    "type": "namespace",
    "name": "files",
    "description": "Files",
    "tools": [FUNCTION, {"type": "custom", "name": "edit"}],
}
SEARCH = {"type": "web_search", "external_web_access": False}


def box(*tools: Any, **fields: Any) -> Toolbox:
    return toolbox(request(tools=list(tools), **fields))


def test_tools_as_the_model_knows_them():
    made = box(FUNCTION, CUSTOM, GROUP, SEARCH)
    assert [tool.name for tool in made.tools] == ["f", "edit", "files__f", "files__edit"]
    assert [tool.custom for tool in made.tools] == [False, True, False, True]
    assert made.tools[1].syntax is not None
    assert made.names["files__f"] == ("files", "f")
    assert made.skipped == ["tools[3].web_search"]
    assert [tool["type"] for tool in made.told] == ["function", "custom", "namespace"]
    assert made.told[0] == {**FUNCTION, "description": None, "strict": False}


@pytest.mark.parametrize("kind", ["web_search", "image_generation", "tool_search", "new_thing"])
def test_what_agents_offer_anyway_is_optional_beside_other_tools(kind):
    assert box(FUNCTION, {"type": kind}).skipped == [f"tools[1].{kind}"]
    with pytest.raises(RequestError) as wrong:
        box({"type": kind})
    assert (wrong.value.param, kind in wrong.value.message) == ("tools[0]", True)
    assert box({"type": kind}, tool_choice="none").tools == []


@pytest.mark.parametrize("kind", ["mcp", "file_search", "code_interpreter", "computer"])
def test_what_works_on_the_users_own_resources_is_refused(kind):
    with pytest.raises(RequestError) as wrong:
        box(FUNCTION, {"type": kind, "server_label": "mine"})
    assert (wrong.value.param, kind in wrong.value.message) == ("tools[1]", True)


@pytest.mark.parametrize(
    ("choice", "made"),
    [
        (None, ToolChoice()),
        ("auto", ToolChoice()),
        ("none", ToolChoice("none")),
        ("required", ToolChoice("required")),
        ({"type": "function", "name": "f"}, ToolChoice("required", ("f",), parallel=False)),
        ({"type": "custom", "name": "edit"}, ToolChoice("required", ("edit",), parallel=False)),
        (
            {"type": "function", "name": "f", "namespace": "files"},
            ToolChoice("required", ("files__f",), parallel=False),
        ),
        (
            {"type": "function", "name": "files__f"},
            ToolChoice("required", ("files__f",), parallel=False),
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            ToolChoice("auto", ("f",)),
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "f"}],
            },
            ToolChoice("required", ("f",)),
        ),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]},
            ToolChoice("none"),
        ),
    ],
)
def test_choices(choice, made):
    asked = request(tools=[FUNCTION, CUSTOM, GROUP, SEARCH], tool_choice=choice)
    assert tool_choice(asked, toolbox(asked)) == made


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"type": "function", "name": "g"}, "tool_choice.name"),
        ({"type": "web_search"}, "tool_choice"),
        ({"type": "mcp", "server_label": "x"}, "tool_choice"),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "mcp"}]},
            "tool_choice.tools[0]",
        ),
    ],
)
def test_choices_that_cannot_be_met(choice, param):
    asked = request(tools=[FUNCTION, SEARCH], tool_choice=choice)
    with pytest.raises(RequestError) as wrong:
        tool_choice(asked, toolbox(asked))
    assert wrong.value.param == param


def test_required_needs_tools_and_no_tools_are_fine_otherwise():
    for choice in (None, "auto", "none"):
        asked = request(tools=[], tool_choice=choice)
        assert toolbox(asked).tools == []
    with pytest.raises(RequestError):
        tool_choice(request(tools=[], tool_choice="required"), Toolbox())


def test_one_call_at_most():
    asked = request(tools=[FUNCTION], parallel_tool_calls=False)
    assert tool_choice(asked, toolbox(asked)) == ToolChoice(parallel=False)


def test_a_strict_schema_is_named_by_its_place():
    (tool,) = toolbox(request(tools=[FUNCTION])).tools
    assert tool.param == "tools[0].parameters"


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "function"}, "tools[0].name"),
        ({"type": "function", "name": "f", "parameters": []}, "tools[0].parameters"),
        ({"type": "custom", "name": "e", "format": {"type": "grammar"}}, "tools[0].format"),
        ({"type": "namespace", "name": "n", "tools": [{}]}, "tools[0].tools[0].type"),
        ({}, "tools[0].type"),
        (7, "tools[0]"),
    ],
)
def test_tools_that_are_wrong_are_named(tool, param):
    with pytest.raises(RequestError) as wrong:
        box(tool)
    assert wrong.value.param == param


def test_two_tools_of_one_name():
    with pytest.raises(RequestError) as wrong:
        box(FUNCTION, FUNCTION)
    assert wrong.value.param == "tools[1]"


# ---------------------------------------------------------------------- other fields


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"max_tokens": 9}, "max_tokens"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"truncation": "left"}, "truncation"),
        ({"background": True, "store": False}, "background"),
        ({"tool_choice": "some"}, "tool_choice"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"n": 2}, "n"),
        ({"truncate_prompt_tokens": 9}, "truncate_prompt_tokens"),
        ({"include_reasoning": False}, "include_reasoning"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ],
)
def test_fields_that_are_wrong_are_named(fields, param):
    with pytest.raises(RequestError) as wrong:
        request(**fields)
    assert wrong.value.param == param


def test_chats_fields_that_ask_for_nothing_pass():
    fields = {"n": 1, "echo": False, "messages": [], "include_reasoning": True}
    assert request(**fields).input


def test_what_has_no_effect_is_named():
    fields = {
        "text": {"verbosity": "low"},
        "client_metadata": {"a": "b"},
        "service_tier": "flex",
        "stream_options": {"include_obfuscation": False},
        "context_management": [{"type": "compaction"}],
        "tools": [FUNCTION | {"defer_loading": True}],
    }
    _, ignored = parse(ResponsesRequest, {"input": "Hi", **fields})
    assert set(ignored) == {
        "text.verbosity",
        "client_metadata",
        "service_tier",
        "stream_options.include_obfuscation",
        "context_management",
        "tools[0].defer_loading",
    }
