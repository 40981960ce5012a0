"""Harmony: prompts and answers equal to openai-harmony's, and every way to go wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from families import PATCH, TOOLS
from harmony_chats import (
    ANSWERS,
    CHATS,
    DATE,
    FINAL,
    ON,
    SPECIALS,
    THINK,
    assistant,
    calling,
    system,
    user,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import assembled
from texts import trained

from ruvon.errors import ConfigError, RequestError
from ruvon.grammars import json_schema
from ruvon.models.chat import load_chat
from ruvon.models.formats.harmony import KNOWN, Mark
from ruvon.models.formats.tools import Reasoning, Tool, ToolChoice, Turn, read_tools
from ruvon.models.harmony_chat import MOST_DATES, HarmonyChat
from ruvon.models.tokenizer import Tokenizer

GOLDEN = json.loads(Path(__file__).with_name("harmony.json").read_text())
OTHERS = ("<|startoftext|>", "<|reserved_200013|>")
OPENED = "<|start|>assistant"


@cache
def tokenizer() -> Tokenizer:
    """A small vocabulary with harmony's marks. Its ends lack one of harmony's and have END."""
    marks = trained(tuple(Mark))
    ends = [marks.added_ids[mark] for mark in (Mark.RETURN, Mark.END)]
    return trained((*Mark, *OTHERS), bos_id=0, eos_ids=(1, *ends))


@cache
def chat() -> HarmonyChat:
    made = load_chat(tokenizer())
    assert isinstance(made, HarmonyChat)
    return made


def encode(text: str) -> list[int]:
    """An answer as the model writes it, marks as tokens."""
    return tokenizer().encode(text, add_special_tokens=False, parse_special=True)


def ask(tools: Sequence[Tool] = TOOLS, **options: Any) -> Turn:
    return chat().turn([user("Hi")], tools=tools, **options)


def read(ids: Sequence[int], turn: Turn | None = None, size: int = 1 << 20, **options: Any) -> Any:
    """What a client makes of an answer that comes in chunks of ``size``."""
    turn = turn or ask()
    text = tokenizer().stream(prompt_ids=turn.prompt, **options)
    parser = turn.parser(text)
    chunks = [ids[at : at + size] for at in range(0, len(ids), size)]
    return assembled([d for chunk in chunks for d in parser.push(chunk)] + parser.finish())


def said(written: str, **options: Any) -> dict[str, Any]:
    return read(encode(written), **options)


def text_of(turn: Turn) -> str:
    return tokenizer().decode(turn.prompt, skip_special_tokens=False)


def turn_of(asked: Mapping[str, Any], chat: HarmonyChat, **options: Any) -> Turn:
    """The turn of one of `CHATS`."""
    form = asked.get("schema")
    return chat.turn(
        asked["messages"],
        tools=read_tools(asked.get("tools", ())),
        reasoning=Reasoning(effort=asked.get("effort")),
        response=None if form is None else json_schema(**form),
        kwargs={"conversation_start_date": DATE, **asked.get("kwargs", {})},
        **options,
    )


def folded(messages: Sequence[Mapping[str, str]], tools: Sequence[Tool] = TOOLS) -> dict[str, Any]:
    """What openai-harmony's messages come to here."""
    told: dict[str, list[Any]] = {"text": [], "reasoning": [], "calls": []}
    for each in messages:
        name = (each["recipient"] or "").removeprefix("functions.")
        if name in {tool.name for tool in tools}:
            told["calls"].append((name, each["text"]))
        elif each["text"]:
            told["reasoning" if each["channel"] == "analysis" else "text"].append(each["text"])
    joined = {kind: "\n\n".join(told[kind]) for kind in ("text", "reasoning")}
    return {**joined, "calls": told["calls"]}


# ---------------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", CHATS)
def test_a_prompt_is_openai_harmonys(name):
    turn = turn_of(CHATS[name], chat())
    assert text_of(turn) == GOLDEN["prompts"][name]


def test_what_a_client_writes_becomes_no_special_token():
    turn = turn_of(CHATS["special tokens"], chat())
    marks = [id for id in turn.prompt if id in tokenizer().special_ids]
    # system, developer, user; thought, preamble, call, result; user; and the opening
    assert tokenizer().decode(marks, skip_special_tokens=False) == (
        "<|start|><|message|><|end|>" * 3
        + "<|start|><|channel|><|message|><|end|>" * 2
        + "<|start|><|channel|><|constrain|><|message|><|call|>"
        + "<|start|><|channel|><|message|><|end|>"
        + "<|start|><|message|><|end|><|start|>"
    )


def test_no_tools_no_commentary():
    """What went there without tools was lost."""
    assert "# Valid channels: analysis, final." in text_of(ask(()))
    assert "# Valid channels: analysis, final." in text_of(ask(choice=ToolChoice("none")))
    assert "analysis, commentary, final" in text_of(ask())
    assert "namespace" not in text_of(ask(choice=ToolChoice("none")))


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_reasoning_effort(effort):
    assert f"\n\nReasoning: {effort}\n\n" in text_of(ask(reasoning=Reasoning(effort=effort)))
    told = ask(kwargs={"reasoning_effort": effort}, reasoning=Reasoning(effort="low"))
    assert f"\n\nReasoning: {effort}\n\n" in text_of(told)


@pytest.mark.parametrize("effort", ["none", "minimal", "xhigh", "max", "Low"])
def test_other_efforts_are_refused_by_name(effort):
    with pytest.raises(RequestError, match="low, medium, high") as error:
        ask(reasoning=Reasoning(effort=effort, param="reasoning.effort"))
    assert error.value.param == "reasoning.effort"
    with pytest.raises(RequestError) as error:
        ask(kwargs={"reasoning_effort": effort})
    assert error.value.param == "chat_template_kwargs.reasoning_effort"


@pytest.mark.parametrize(
    ("kwargs", "where"),
    [
        ({"conversation_start_date": "31.1.2026"}, "conversation_start_date"),
        ({"builtin_tools": ["shell"]}, "builtin_tools"),
        ({"builtin_tools": "python"}, "builtin_tools"),
        ({"model_identity": 1}, "model_identity"),
    ],
)
def test_variables_that_make_no_sense_are_refused(kwargs, where):
    with pytest.raises(RequestError) as error:
        ask(kwargs=kwargs)
    assert error.value.param == f"chat_template_kwargs.{where}"
    assert chat().reads(where)
    assert not chat().reads("enable_thinking")


def test_without_thinking_the_answer_is_begun():
    turn = ask((), reasoning=Reasoning(enabled=False))
    assert text_of(turn).endswith(f"{OPENED}<|channel|>final<|message|>")
    assert turn.ignored == ()
    assert read(encode("Hello<|return|>"), turn)["text"] == "Hello"
    form = json_schema({"type": "object"})
    assert ask((), reasoning=Reasoning(enabled=False), response=form).grammar == form


def test_who_may_call_tools_thinks():
    assert ask(reasoning=Reasoning(enabled=False)).ignored == ("enable_thinking",)
    assert ask(reasoning=Reasoning(enabled=False)).prompt == ask().prompt
    assert ask(reasoning=Reasoning(enabled=True)).ignored == ()


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ({"role": "wizard", "content": ""}, "messages[1].role"),
        ({"role": "user", "content": 1}, "messages[1].content"),
        ({"role": "tool", "content": "", "tool_call_id": "x"}, "messages[1].tool_call_id"),
        ({"role": "assistant", "tool_calls": ["x"]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "messages[1].tool_calls[0]"),
    ],
)
def test_messages_that_make_no_sense_are_refused(message, where):
    with pytest.raises(RequestError) as error:
        chat().turn([user("Hi"), message])
    assert error.value.param == where


def test_results_find_their_names():
    """By the call's id; without one by the message's own name, or the last call."""
    told = [calling("now", "{}", "a"), {"role": "tool", "content": "x", "name": "later"}]
    assert "<|start|>functions.later to=assistant" in text_of(chat().turn([user(""), *told]))
    del told[1]["name"]
    assert "<|start|>functions.now to=assistant" in text_of(chat().turn([user(""), *told]))


def test_a_final_answer_is_continued():
    turn = chat().turn([user("Hi"), assistant("Once upon", "A tale.")], continue_final_message=True)
    end = "analysis<|message|>A tale.<|end|><|start|>assistant<|channel|>final<|message|>Once upon"
    assert text_of(turn).endswith(end)
    assert read(encode(" a time<|return|>"), turn)["text"] == " a time"
    empty = chat().turn([user("Hi"), assistant("")], continue_final_message=True)
    assert text_of(empty).endswith(f"{OPENED}<|channel|>final<|message|>")
    response = json_schema({"type": "object"})
    asked = {"continue_final_message": True, "response": response}
    assert chat().turn([user("Hi"), assistant("{")], **asked).grammar == response
    with pytest.raises(RequestError, match="no answer"):
        chat().turn([user(""), calling("f", "{}")], continue_final_message=True)
    with pytest.raises(RequestError, match="no call"):
        chat().turn(
            [user("Hi"), assistant("x")],
            tools=TOOLS,
            choice=ToolChoice("required"),
            continue_final_message=True,
        )


def test_without_a_generation_prompt_the_model_opens_its_turn():
    turn = chat().turn([user("Hi")], add_generation_prompt=False)
    assert text_of(turn).endswith("Hi<|end|>")
    assert read(encode(f"{OPENED}<|channel|>final<|message|>Hello"), turn)["text"] == "Hello"


def test_render_and_encode_are_the_turns():
    options = {"tools": CHATS["a call"]["tools"], "kwargs": {"conversation_start_date": DATE}}
    messages = CHATS["a call"]["messages"]
    assert chat().render(messages, **options) == GOLDEN["prompts"]["a call"]
    assert tuple(chat().encode(messages, **options)) == turn_of(CHATS["a call"], chat()).prompt


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"documents": [{"text": "x"}]}, "documents"),
        ({"kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"choice": ToolChoice("required", ("x",))}, "tool_choice"),
    ],
)
def test_options_that_cannot_be_had_are_refused(options, param):
    with pytest.raises(RequestError) as error:
        chat().turn([user("Hi"), assistant("x")], **options)
    assert error.value.param == param


def test_a_tool_must_not_be_called_like_one_built_in():
    with pytest.raises(RequestError, match="built in"):
        ask([Tool("python")], kwargs={"builtin_tools": ["python"]})


def test_a_template_is_refused():
    with pytest.raises(ConfigError, match="chat_template"):
        load_chat(tokenizer(), "{{ messages }}")


# ---------------------------------------------------------------------- dates


class Clock:
    today = date(2026, 1, 31)


def dated(messages: Sequence[Mapping[str, Any]], chat: HarmonyChat) -> str:
    text = chat.render(messages)
    return text.partition("Current date: ")[2][:10]


def test_a_conversation_keeps_the_day_on_which_it_began():
    """Another date would find nothing of the prompt in the prefix cache."""
    marks = {mark: tokenizer().added_ids[mark] for mark in Mark}
    clock = Clock()
    chat = HarmonyChat(tokenizer(), marks, lambda: clock.today)
    first, other = [system("Be kind."), user("Hi")], [user("Hello")]
    assert dated(first, chat) == "2026-01-31"
    clock.today = date(2026, 2, 1)
    assert dated([*first, assistant("Hello"), user("Go on")], chat) == "2026-01-31"
    assert dated([*other, assistant("Hello"), user("Go on")], chat) == "2026-02-01"
    assert dated(first, chat) == "2026-02-01"  # begun anew
    for number in range(MOST_DATES):
        dated([user(str(number))], chat)
    clock.today = date(2026, 2, 2)
    assert dated([*first, assistant("Hello"), user("Go on")], chat) == "2026-02-02"  # forgotten


# ---------------------------------------------------------------------- answers


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_an_answer_is_openai_harmonys(number, size):
    found = read(encode(ANSWERS[number]), size=size)
    del found["num_reasoning"]
    assert found == folded(GOLDEN["answers"][number])


def test_a_mark_that_is_spelt_is_text():
    ids = [*encode("<|channel|>final<|message|>"), *tokenizer().encode(SPECIALS)]
    assert read(ids)["text"] == SPECIALS
    for spelt in (SPECIALS, "<|channel|>analysis Hm", "<|start|>user", "to <|channel|>final"):
        assert read(tokenizer().encode(spelt))["text"] == spelt


def test_tokens_of_reasoning_are_counted_with_what_is_around_them():
    assert said("<|channel|>analysis<|message|>a b<|end|>")["num_reasoning"] == len(
        encode("<|channel|>analysis<|message|>a b<|end|>")
    )
    assert said("<|channel|>final<|message|>a b<|return|>")["num_reasoning"] == 0


BEGIN = "<|channel|>analysis<|message|>Hm.<|end|>"
CALL = "<|message|>{}<|call|>"
FAULTS = {
    "no markup": ("Hello there, you.", {"text": "Hello there, you."}),
    "one word": ("Hello", {"text": "Hello"}),
    "free text behind a channel": ("<|channel|>I will do that", {"text": "I will do that"}),
    "no message": ("<|channel|>final Hello there", {"text": "Hello there"}),
    "no message, and more": (
        "<|channel|>final A b c d e f g h i j<|end|>", {"text": "A b c d e f g h i j"},
    ),
    "a channel with a question mark": (
        "<|channel|>commentary? to=functions.anything json" + CALL, {"calls": [("anything", "{}")]},
    ),
    "a channel that is none": ("<|channel|>comment<|message|>Hello", {"text": "Hello"}),
    "a channel within a word": ("<|channel|>analysisfoo<|message|>Hm", {"reasoning": "Hm"}),
    "a channel twice": (
        "<|channel|>analysis<|channel|>final<|message|>Hm", {"reasoning": "Hm"},
    ),
    "a header twice": (
        "<|channel|>final<|start|>assistant<|channel|>final<|message|>Hello", {"text": "Hello"},
    ),
    "a message twice": ("<|channel|>final<|message|><|message|>Hello", {"text": "Hello"}),
    "no channel": ("<|message|>Hello", {"text": "Hello"}),
    "extra words": (
        "<|channel|>commentary well then to=functions.anything now json" + CALL,
        {"calls": [("anything", "{}")]},
    ),
    "no to": ("<|channel|>commentary functions.anything" + CALL, {"calls": [("anything", "{}")]}),
    "no start": (BEGIN + "assistant" + FINAL + "Hi", {"reasoning": "Hm.", "text": "Hi"}),
    "no start, no role": (BEGIN + FINAL + "Hi", {"reasoning": "Hm.", "text": "Hi"}),
    "nothing but a message": (BEGIN + "<|message|>Hi", {"reasoning": "Hm.", "text": "Hi"}),
    "text behind an end": (BEGIN + " Well, hello.", {"reasoning": "Hm.", "text": "Well, hello."}),
    "no end": (
        "<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>final<|message|>Hi",
        {"reasoning": "Hm.", "text": "Hi"},
    ),
    "a channel amid a message": (
        "<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Hi",
        {"reasoning": "Hm.", "text": "Hi"},
    ),
    "constrained text": ("<|channel|>final<|message|><|constrain|>Hi", {"text": "Hi"}),
    "a line in a header": ("<|channel|>final\nHi<|end|>", {"text": "Hi"}),
    "half a character": ("<|channel|>final<|message|>\udcf0", {"text": "\ufffd"}),
    "another's message": (
        "<|channel|>final<|message|>Hi<|end|><|start|>user<|message|>Hello<|end|>", {"text": "Hi"},
    ),
    "a result of its own": (
        "<|channel|>final<|message|>Hi<|end|><|start|>functions.anything to=assistant"
        "<|channel|>commentary<|message|>{}<|end|>", {"text": "Hi"},
    ),
    "a tool that is not offered": (
        "<|channel|>commentary to=functions.shell json<|message|>{}<|call|>", {"text": "{}"},
    ),
    "a thought to nobody": (
        "<|channel|>analysis to=functions.shell<|message|>Hm<|call|>", {"reasoning": "Hm"},
    ),
    "a call on the final channel": (
        "<|channel|>final to=functions.anything json" + CALL, {"calls": [("anything", "{}")]},
    ),
    "arguments that are text": (
        "<|channel|>commentary to=functions.anything json<|message|>Let me see.<|call|>",
        {"text": "Let me see."},
    ),
    "arguments that are a list": (
        "<|channel|>commentary to=functions.anything json<|message|>[1]<|call|>", {"text": "[1]"},
    ),
    "braces that are no object": (
        "<|channel|>analysis to=functions.anything json<|message|>{{x<|call|>",
        {"reasoning": "{{x"},
    ),
    "no arguments": (
        "<|channel|>commentary to=functions.anything<|message|><|call|>",
        {"calls": [("anything", "{}")]},
    ),
    "JSON in JSON": (
        '<|channel|>commentary to=functions.anything<|message|>"{\\"a\\": 1}"<|call|>',
        {"calls": [("anything", '{"a": 1}')]},
    ),
    "text behind an object": (
        "<|channel|>commentary to=functions.anything<|message|> {} Done.<|call|>",
        {"calls": [("anything", "{}")]},
    ),
    "cut off in a header": (BEGIN + "<|start|>assist", {"reasoning": "Hm."}),
    "cut off in a channel": ("<|channel|>comment", {}),
    "cut off in arguments": (
        '<|channel|>commentary to=functions.anything<|message|>{"a": "b',
        {"calls": [("anything", '{"a": "b')]},
    ),
    "behind the end": (
        "<|channel|>final<|message|>Hi<|return|><|start|>assistant<|channel|>final<|message|>Ho",
        {"text": "Hi\n\nHo"},
    ),
}  # fmt: skip
"""As models write it, and what is made of it."""


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("name", FAULTS)
def test_what_is_badly_written_is_read(name, size):
    written, expected = FAULTS[name]
    if name == "half a character":
        emoji = tokenizer().encode("\U0001f9ff")
        written, ids = "", [*encode("<|channel|>final<|message|>"), emoji[0]]
    else:
        ids = encode(written)
    found = read(ids, size=size)
    del found["num_reasoning"]
    assert found == {"text": "", "reasoning": "", "calls": [], **expected}


def test_a_custom_tool_takes_text_either_way():
    head = "<|channel|>commentary to=functions.patch code<|message|>"
    assert said(head + '{"input": "*** a\\n"}<|call|>')["calls"] == [("patch", "*** a\n")]
    assert said(head + "*** a\n<|call|>")["calls"] == [("patch", "*** a\n")]
    turn = ask([PATCH], choice=ToolChoice("required", ("patch",)))
    assert read(encode(head + '{"input": 1}'), turn)["calls"] == [("patch", '{"input": 1}')]


def test_tools_built_in_are_called_by_their_names():
    turn = ask(kwargs={"builtin_tools": ["browser", "python"]})
    found = read(
        encode(
            '<|channel|>analysis to=browser.search code<|message|>{"query":"x"}<|end|>'
            f"{OPENED}<|channel|>analysis to=python code<|message|>print({{}})\n<|call|>"
        ),
        turn,
    )
    assert found["calls"] == [("browser.search", '{"query":"x"}'), ("python", "print({})\n")]
    assert found["reasoning"] == ""


def test_one_call_is_enough_if_they_are_not_parallel():
    call = "<|channel|>commentary to=functions.anything json<|message|>{}<|end|><|start|>assistant"
    assert len(said(call * 2)["calls"]) == 2
    turn = ask(choice=ToolChoice("auto", parallel=False))
    assert len(said(call * 2, turn=turn)["calls"]) == 1


def test_stop_strings_are_found_in_messages_only():
    written = f"{THINK}fin{ON}{FINAL}al, then"
    assert said(written, stop=["final"])["text"] == "al, then"  # neither in headers nor across them
    assert said(written, stop=["al,"])["text"] == ""
    assert said(written, stop=["then", "in"])["reasoning"] == "f"


def test_generation_stops_where_harmony_does_whatever_files_say():
    """Early files lacked CALL; converters have taken END for an end."""
    ids = tokenizer().added_ids
    found = chat().stop_ids((1, ids[Mark.END], 1))
    assert set(found) == {1, ids[Mark.RETURN], ids[Mark.CALL]}


MARKS = st.sampled_from([*Mark])
WORDS = st.sampled_from(
    ["assistant", "user", " to=functions.weather", "functions.weather to=assistant", "analysis",
     "commentary", "final", "final?", " json", " code", " ", "\n", "{", '{"city": "a"}', '"', "x y",
     "🙂", SPECIALS]
)  # fmt: skip
IDS = st.integers(0, 800)


@settings(max_examples=300, deadline=None)
@given(st.lists(MARKS | WORDS | IDS, max_size=40), st.integers(1, 7))
def test_whatever_comes_is_read_however_it_is_cut(parts, size):
    ids = [id for part in parts for id in (encode(part) if isinstance(part, str) else [part])]
    assert read(ids, size=size) == read(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_text_alone_is_not_lost(text):
    """An answer without any mark is content, but for white space before it."""
    begun = text.encode().lstrip()
    found = read(tokenizer().encode(text))
    if any(word.startswith(begun.rstrip()) for word in KNOWN):
        assert found["text"] == ""
    else:
        assert found["text"] == begun.decode()
