"""What a grammar lets a model write in harmony is what the parser reads, and what was asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from families import ANYTHING, PATCH, TOOLS, WEATHER
from harmony_chats import FINAL, ON, THINK, assistant, user
from test_harmony import ask, chat, encode, read, tokenizer

from ruvon.engine.grammar import Vocabulary
from ruvon.grammars import Grammar, choice, json_schema, regex
from ruvon.models.formats.tools import Reasoning, Tool, ToolChoice, Turn

REQUIRED = ToolChoice("required")
PLACE = {name: WEATHER.parameters["properties"][name] for name in ("city", "days")}
STRICT = replace(WEATHER, strict=True, parameters={**WEATHER.parameters, "properties": PLACE})
NUMBERS = json_schema({"type": "object", "properties": {"n": {"type": "integer"}}})
PADDING = 9  # of the model's head, which has so many rows more than there are tokens
CALL = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>%s"
BEFORE = " to=functions.weather<|channel|>commentary <|constrain|>json<|message|>%s"
ROME = '{"city":"Roma","days":3}'


@cache
def vocabulary() -> llguidance.LLTokenizer:
    ends = [*chat().stop_ids(tokenizer().eos_ids)]
    tokens = Vocabulary(tokenizer(), tokenizer().vocab_size + PADDING, ends)
    return llguidance.LLTokenizer(tokens, eos_token=ends)


def matcher(turn: Turn) -> llguidance.LLMatcher:
    assert turn.grammar is not None
    made = llguidance.LLMatcher(vocabulary(), turn.grammar.lark())
    assert not made.is_error(), made.get_error()
    return made


def accepts(turn: Turn, written: str) -> bool:
    """Whether the grammar allows an answer, and an end after it."""
    ids, made = encode(written), matcher(turn)
    return made.try_consume_tokens(ids) == len(ids) and made.is_accepting()


def allowed(made: llguidance.LLMatcher) -> list[int]:
    bits = np.unpackbits(np.frombuffer(made.compute_bitmask(), np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def walks(turn: Turn, count: int = 12, most: int = 500) -> list[dict[str, Any]]:
    """What is read of what a model might write that draws from the masks, and prefers what ends
    things; of the walks that come to an end."""
    found = []
    ends = {*chat().stop_ids(tokenizer().eos_ids)}
    closing = {*ends, *tokenizer().added_ids.values(), *encode('"')}
    for seed in range(count):
        draw, made, ids = random.Random(seed), matcher(turn), []
        while not made.is_stopped() and len(ids) < most:
            tokens = allowed(made)
            short = sorted(closing.intersection(tokens))
            token = draw.choice(short if short and draw.random() < 0.3 else tokens)
            assert made.consume_token(token)
            ids.append(token)
        if made.is_stopped():
            found.append(read(ids[:-1] if ids[-1] in ends else ids, turn))
    assert found
    return found


def check_calls(calls: Sequence[tuple[str, str]], tools: Sequence[Tool]) -> None:
    named = {tool.name: tool for tool in tools}
    for name, arguments in calls:
        if not named[name].custom:
            jsonschema.validate(json.loads(arguments), named[name].parameters or {})


def test_a_required_call_is_always_one():
    turn = ask(choice=REQUIRED)
    for result in walks(turn):
        assert len(result["calls"]) == 1
        assert result["text"] == ""
        check_calls(result["calls"], TOOLS)
    assert accepts(turn, f"{THINK}a{ON}{THINK}b{ON}{CALL % ROME}")
    assert accepts(turn, BEFORE % ROME)
    assert not accepts(turn, f"{FINAL}Hi")
    assert not accepts(turn, f"{THINK}a")
    assert not accepts(turn, f"<|channel|>commentary<|message|>Plan{ON}{CALL % ROME}")


def test_a_named_tool_is_called():
    turn = ask(choice=ToolChoice("required", ("weather",)))
    for result in walks(turn, 6):
        ((name, arguments),) = result["calls"]
        assert name == "weather"
        check_calls([(name, arguments)], TOOLS)
    assert not accepts(turn, (CALL % "{}").replace("weather", "anything"))


@pytest.mark.parametrize("form", ["", " json", "<|constrain|>json", " <|constrain|>json"])
def test_the_forms_of_a_call_are_allowed(form):
    turn = ask([ANYTHING], choice=REQUIRED)
    assert accepts(turn, f"<|channel|>commentary to=functions.anything{form}<|message|>{{}}")
    assert accepts(turn, f" to=functions.anything<|channel|>commentary{form}<|message|>{{}}")


def test_an_answers_form_holds_on_the_final_channel_only():
    turn = ask((), response=NUMBERS)
    for result in walks(turn):
        jsonschema.validate(json.loads(result["text"]), NUMBERS.form.schema)
    assert accepts(turn, f'{THINK}Some {{text}} here.{ON}{FINAL}{{"n":1}}')
    assert not accepts(turn, f'{FINAL}{{"n":"x"}}')
    assert not accepts(turn, f"<|channel|>commentary<|message|>Plan{ON}{FINAL}{{}}")
    assert turn.grammar.param == "response_format"


def test_an_answers_form_and_tools_leave_the_choice():
    turn = ask(response=NUMBERS)
    assert accepts(turn, f'{FINAL}{{"n":1}}')
    assert accepts(turn, f"{THINK}Hm.{ON}{CALL % ROME}")
    assert not accepts(turn, CALL % '{"city":1}')


@pytest.mark.parametrize("response", [regex("[a-c]+"), choice(["ab", "c"])])
def test_other_forms_hold_too(response):
    turn = ask((), response=response)
    assert {*"".join(result["text"] for result in walks(turn, 4))} <= {*"abc"}
    assert "Response Formats" not in tokenizer().decode(turn.prompt)


def test_strict_tools_are_held_to_their_schemas_when_they_are_called():
    turn = ask([STRICT])
    assert accepts(turn, f"{FINAL}Free text, {{not JSON}}")
    assert accepts(
        turn,
        f"{THINK}a{ON}<|channel|>commentary<|message|>Plan{ON}{THINK}b{ON}{CALL % ROME}",
    )
    assert not accepts(turn, CALL % '{"city":"Roma"}')
    for result in walks(turn):
        check_calls(result["calls"], [STRICT])


def test_allowed_tools():
    turn = ask(choice=ToolChoice("auto", ("weather",)))
    assert accepts(turn, CALL % ROME)
    assert accepts(turn, f"{FINAL}Hi")
    assert not accepts(turn, "<|channel|>commentary to=functions.anything json<|message|>{}")


def test_nothing_asked_for_is_free():
    assert ask().grammar is None
    assert ask((), choice=ToolChoice("none")).grammar is None


@pytest.mark.parametrize("tools", [(), TOOLS])
def test_a_budget_ends_reasoning(tools):
    turn = ask(tools, reasoning=Reasoning(budget=3))
    short, long = "a", "a long and winding thought that goes on"
    assert len(encode(short)) <= 3 < len(encode(long))
    assert accepts(turn, f"{THINK}{short}{ON}{FINAL}Hi")
    assert accepts(turn, f"{FINAL}Hi")
    assert not accepts(turn, f"{THINK}{long}{ON}{FINAL}Hi")
    assert not accepts(turn, f"{THINK}a{ON}{THINK}a{ON}{FINAL}Hi")
    none = ask(tools, reasoning=Reasoning(budget=0))
    assert accepts(none, f"{FINAL}Hi")
    assert not accepts(none, f"{THINK}a{ON}{FINAL}Hi")


def test_a_budget_and_a_required_call():
    turn = ask(choice=REQUIRED, reasoning=Reasoning(budget=2))
    assert accepts(turn, f"{THINK}a{ON}{CALL % ROME}")
    assert not accepts(turn, f"{THINK}a{ON}{THINK}a{ON}{CALL % ROME}")


def test_a_custom_tools_input_keeps_its_own_grammar():
    syntax = Grammar("/[a-c]+\\n/", param="tools[0]")
    turn = ask([replace(PATCH, syntax=syntax)], choice=ToolChoice("required", ("patch",)))
    for result in walks(turn, 4):
        ((name, text),) = result["calls"]
        assert name == "patch"
        assert {*text} <= {*"abc\n"}


def test_tools_built_in_may_be_called_too():
    turn = ask([STRICT], kwargs={"builtin_tools": ["browser", "python"]})
    assert accepts(turn, "<|channel|>analysis to=python<|message|>1 + 1")
    assert accepts(turn, '<|channel|>analysis to=browser.search<|message|>{"query":"x"}')


def test_a_continued_answer_has_its_form_from_the_start():
    turn = chat().turn(
        [user("Hi"), assistant("The number:")],
        continue_final_message=True,
        response=regex("[0-9]+"),
    )
    assert accepts(turn, "42")
    assert not accepts(turn, f"{FINAL}42")


def test_a_turn_that_is_not_opened_is_opened_by_the_model():
    asked = {"response": regex("[0-9]+"), "add_generation_prompt": False}
    turn = chat().turn([user("Hi")], **asked)
    assert accepts(turn, f"<|start|>assistant{FINAL}42")
    assert not accepts(turn, f"{FINAL}42")


def test_a_mark_spelt_as_text_is_none():
    """A string within JSON may spell one; the header may not."""
    turn = ask((), response=json_schema({"type": "string"}))
    ids = [*encode(FINAL), *tokenizer().encode('"<|end|>"')]
    made = matcher(turn)
    assert made.try_consume_tokens(ids) == len(ids)
    spelt = tokenizer().encode(FINAL)
    assert matcher(turn).try_consume_tokens(spelt) < len(spelt)
