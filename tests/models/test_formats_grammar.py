"""What a grammar lets a model write is what the parser reads: random walks through its masks."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import jsonschema
import llguidance
import numpy as np
import pytest
from families import ANYTHING, CHATML, FAMILIES, PATCH, TOOLS, WEATHER, Family
from test_formats import USER, ask, assembled, encode, read, written

from ruvon.engine.grammar import Vocabulary
from ruvon.errors import RequestError
from ruvon.grammars import Grammar
from ruvon.models.formats.grammar import MOST_CALLS
from ruvon.models.formats.plain import PlainParser
from ruvon.models.formats.tools import Reasoning, Tool, ToolChoice, Turn

EOS = 1
PADDING = 9  # of the model's head, which has so many rows more than there are tokens
CALLING = [name for name in FAMILIES if name != "opened"]
CITIES = {key: WEATHER.parameters["properties"][key] for key in ("city", "days")}
STRICT = replace(WEATHER, strict=True, parameters={**WEATHER.parameters, "properties": CITIES})
REQUIRED = ToolChoice("required")
CLOSED = {"type": "object", "additionalProperties": False, "required": ["a"]}


@cache
def vocabulary(family: str) -> llguidance.LLTokenizer:
    tokenizer = FAMILIES[family].tokenizer
    tokens = Vocabulary(tokenizer, tokenizer.vocab_size + PADDING, [EOS])
    return llguidance.LLTokenizer(tokens, eos_token=[EOS])


def matcher(family: str, grammar: Grammar) -> llguidance.LLMatcher:
    made = llguidance.LLMatcher(vocabulary(family), grammar.lark())
    assert not made.is_error(), made.get_error()
    return made


def accepts(family: str, turn: Turn, text: str) -> bool:
    """Whether the grammar allows a text, and an end after it."""
    ids = encode(family, text)
    made = matcher(family, turn.grammar)
    return made.try_consume_tokens(ids) == len(ids) and made.is_accepting()


def allowed(made: llguidance.LLMatcher) -> list[int]:
    bits = np.unpackbits(np.frombuffer(made.compute_bitmask(), np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def walk(family: str, turn: Turn, seed: int, most: int = 400) -> list[int] | None:
    """What a model might write that draws from the masks, and prefers what ends things. None if
    it comes to no end."""
    draw = random.Random(seed)
    made = matcher(family, turn.grammar)
    tokenizer = FAMILIES[family].tokenizer
    ends = {EOS, *tokenizer.added_ids.values(), *encode(family, '"')}
    ids: list[int] = []
    while not made.is_stopped():
        tokens = allowed(made)
        closing = ends.intersection(tokens)
        token = draw.choice(sorted(closing) if closing and draw.random() < 0.3 else tokens)
        assert made.consume_token(token)
        ids.append(token)
        if len(ids) == most:
            return None
    return [id for id in ids if id != EOS]


def check_calls(calls: Sequence[tuple[str, str]], tools: Sequence[Tool] = TOOLS) -> None:
    """Their arguments are what the tools ask for."""
    named = {tool.name: tool for tool in tools}
    for name, arguments in calls:
        if not named[name].custom:
            jsonschema.validate(json.loads(arguments), named[name].parameters or {})


@pytest.mark.parametrize("family", CALLING)
def test_a_required_call_is_always_one(family):
    turn = ask(family, choice=REQUIRED)
    ended = [ids for seed in range(8) if (ids := walk(family, turn, seed)) is not None]
    assert ended
    for ids in ended:
        result = assembled(read(family, [ids], turn))
        assert result["calls"]
        assert result["text"] == ""
        check_calls(result["calls"])


@pytest.mark.parametrize("family", ["hermes", "mistral", "coder"])
def test_required_calls_come_to_an_end(family):
    """A small model would go on with them until it has no tokens left."""
    turn = ask(family, choice=REQUIRED)
    whole = written(family).replace('{"city": "Róma {\\"}", "days": 3}', '{"city":"a","days":3}')
    listed = family == "mistral"
    begin, call = whole.split("[{") if listed else ("", whole)
    begin, call, joint, end = (
        (f"{begin}[", "{" + call[:-1], ", ", "]") if listed else ("", whole, "\n", "")
    )
    assert accepts(family, turn, begin + joint.join([call] * MOST_CALLS) + end)
    assert not accepts(family, turn, begin + joint.join([call] * (MOST_CALLS + 1)) + end)


@pytest.mark.parametrize("family", CALLING)
def test_a_named_tool_is_called_once_if_not_in_parallel(family):
    turn = ask(family, choice=ToolChoice("required", ("weather",), parallel=False))
    for seed in range(4):
        ids = walk(family, turn, seed)
        if ids is not None:
            ((name, arguments),) = assembled(read(family, [ids], turn))["calls"]
            assert name == "weather"
            check_calls([(name, arguments)])
    assert not accepts(family, turn, written(family) + written(family))


@pytest.mark.parametrize("family", CALLING)
def test_a_required_call_that_is_cut_off_is_no_text(family):
    turn = ask(family, choice=REQUIRED)
    ids = encode(family, written(family))
    for size in range(len(ids)):
        assert assembled(read(family, [ids[:size]], turn))["text"] == ""


@pytest.mark.parametrize("family", CALLING)
def test_calls_of_strict_tools_are_right_wherever_they_begin(family):
    turn = ask(family, [STRICT])
    assert turn.grammar.param == "tools"
    good, bad = '{"city":"a","days":3}', '{"city":"a"}'
    call = written(family).replace('{"city": "Róma {\\"}", "days": 3}', "%s")
    assert accepts(family, turn, "Just text.")
    if family == "coder":
        good, bad, call = "3", "x", call.replace("3", "%s")
    assert accepts(family, turn, call % good)
    assert not accepts(family, turn, call % bad)
    if family != "llama":
        assert accepts(family, turn, f"Let me see.\n{call % good}")
        assert not accepts(family, turn, f"Let me see.\n{call % bad}")


@pytest.mark.parametrize("family", CALLING)
def test_a_custom_tool_that_is_forced_writes_its_input_as_it_is(family):
    syntax = Grammar('"*** Begin\\n" LINE{1,3} "*** End\\n"', "LINE: /[a-z]{1,4}\\n/")
    patch = replace(PATCH, syntax=syntax)
    turn = ask(family, [WEATHER, patch], choice=ToolChoice("required", ("patch",)))
    ids = walk(family, turn, 1)
    ((name, text),) = assembled(read(family, [ids], turn))["calls"]
    assert name == "patch"
    assert text.startswith("*** Begin\n")
    assert text.endswith("*** End\n")


@pytest.mark.parametrize("family", CALLING)
def test_an_answer_of_a_form_or_a_call(family):
    response = Grammar('"yes" | "no"')
    turn = ask(family, [WEATHER], response=response)
    assert accepts(family, turn, "yes")
    assert not accepts(family, turn, "maybe")
    assert ask(family, (), response=response).grammar is response or family == "thinking"


def test_no_other_way_leads_around_a_strict_tool():
    assert not accepts("coder", ask("coder", [STRICT]), "Well. <function=weather>\n</function>")


def test_names_may_be_of_any_script():
    tool = Tool(
        "naïve_日本", parameters={"type": "object", "properties": {"é": {"type": "string"}}}
    )
    turn = ask("hermes", [tool], choice=REQUIRED)
    call = '<tool_call>\n{"name": "naïve_日本", "arguments": {"é":"ü"}}\n</tool_call>'
    assert accepts("hermes", turn, call)
    tags = "<function=naïve_日本>\n<parameter=é>\nü\n</parameter>\n</function>"
    turn = ask("coder", [tool], choice=REQUIRED)
    assert accepts("coder", turn, f"<tool_call>\n{tags}\n</tool_call>")


def test_only_the_allowed_are_called():
    turn = ask("hermes", choice=ToolChoice("auto", ("anything",)))
    call = '<tool_call>\n{"name": "%s", "arguments": {}}\n</tool_call>'
    assert accepts("hermes", turn, "Well. " + call % "anything")
    assert not accepts("hermes", turn, call % "weather")
    assert "weather" in FAMILIES["hermes"].tokenizer.decode(turn.prompt)


@pytest.mark.parametrize(
    ("choice", "tools"),
    [(ToolChoice("required", ("nobody",)), TOOLS), (ToolChoice("required"), ())],
)
def test_a_choice_that_cannot_be_met_is_refused(choice, tools):
    with pytest.raises(RequestError) as caught:
        ask("hermes", tools, choice=choice)
    assert caught.value.param == "tool_choice"


def test_a_strict_tool_keeps_openais_rules():
    with pytest.raises(RequestError, match="'required' at '/required'") as caught:
        ask("hermes", [replace(WEATHER, strict=True, param="tools[0]")])
    assert caught.value.param == "tools[0]"


def test_no_choice_shows_no_tools():
    turn = ask("hermes", choice=ToolChoice("none"))
    assert turn.prompt == ask("hermes", ()).prompt
    assert turn.grammar is None
    assert assembled(read("hermes", [encode("hermes", written("hermes"))], turn))["calls"] == []


def test_an_unknown_schema_takes_any_arguments_in_tags():
    turn = ask("coder", [ANYTHING], choice=REQUIRED)
    call = "<tool_call>\n<function=anything>\n%s</function>\n</tool_call>"
    assert accepts("coder", turn, call % "")
    assert accepts("coder", turn, call % "<parameter=a>\n1\n2\n</parameter>\n")


# Reasoning


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("thinking", "<think>\nHm. \n</think>\n\nYes\n"),
        ("thinking", "\n<think>Hm.</think>Yes\n"),
        ("opened", "Hm.\n</think>\n\nYes\n"),
        ("opened", "<think>\nHm.\n</think>Yes\n"),
    ],
)
def test_reasoning_is_split_off_and_counted(family, text):
    ids = encode(family, text)
    result = assembled(read(family, [ids], ask(family, ())))
    assert (result["reasoning"], result["text"]) == ("Hm.", "Yes\n")
    end = ids.index(FAMILIES[family].tokenizer.added_ids["</think>"])
    begin = 1 if text.startswith("\n") else 0
    assert result["num_reasoning"] == end + 1 - begin


def test_reasoning_without_an_end_is_all_reasoning():
    result = assembled(read("opened", [encode("opened", "Hm <tool_call> \n</thi")], ask("opened")))
    assert result["reasoning"] == "Hm <tool_call> \n</thi"
    assert result["text"] == ""


def test_calls_follow_reasoning():
    text = f"<think>{written('hermes')}</think>\n{written('hermes')}"
    result = assembled(read("thinking", [encode("thinking", text)]))
    assert result["reasoning"] == written("hermes")
    assert len(result["calls"]) == 1


def test_reasoning_can_be_switched_off():
    turn = ask("thinking", (), reasoning=Reasoning(enabled=False))
    assert "</think>" in FAMILIES["thinking"].tokenizer.decode(turn.prompt)
    assert turn.parser is PlainParser
    assert turn.ignored == ()
    assert ask("thinking", (), reasoning=Reasoning(effort="none")).prompt == turn.prompt
    explicit = ask("thinking", (), reasoning=Reasoning(enabled=True), kwargs={"enable_thinking": 0})
    assert explicit.prompt == turn.prompt


def test_wishes_that_the_template_does_not_know_are_named():
    wishes = Reasoning(budget=3, enabled=False, effort="low")
    ignored = ("reasoning_effort", "enable_thinking", "thinking_token_budget")
    assert ask("hermes", (), reasoning=wishes).ignored == ignored
    assert ask("opened", (), reasoning=wishes).ignored == ignored[:2]


def test_effort_is_told_to_templates_that_ask():
    effort = Family(CHATML + "{{ reasoning_effort }}")
    turn = effort.chat.turn([USER], reasoning=Reasoning(effort="low"))
    assert effort.tokenizer.decode(turn.prompt).endswith("low")
    assert turn.ignored == ()


@pytest.mark.parametrize("family", ["thinking", "opened"])
@pytest.mark.parametrize("budget", [0, 3])
def test_a_budget_ends_reasoning(family, budget):
    turn = ask(family, (), reasoning=Reasoning(budget=budget))
    tokenizer = FAMILIES[family].tokenizer
    start, end, word = (*encode(family, "<think></think>"), *encode(family, "a"))
    made = matcher(family, turn.grammar)
    if family == "thinking":
        assert made.consume_token(start)
    for _ in range(budget):
        assert {word, end} <= {*allowed(made)}
        assert EOS not in allowed(made)
        assert made.consume_token(word)
    assert allowed(made) == [end]
    assert made.consume_token(end)
    assert max(allowed(made)) < tokenizer.vocab_size
    rest = encode(family, "An answer <tool_call>")
    assert made.try_consume_tokens([*rest, EOS]) == len(rest) + 1
    assert tokenizer.decode(turn.prompt) == tokenizer.decode(ask(family, ()).prompt)


def test_a_model_may_think_less_than_its_budget_or_not_at_all():
    turn = ask("thinking", (), reasoning=Reasoning(budget=9))
    assert accepts("thinking", turn, "<think>a</think>b")
    assert accepts("thinking", turn, "b")


@pytest.mark.parametrize("budget", [None, 20])
def test_the_form_of_an_answer_begins_after_reasoning(budget):
    response = Grammar('"yes" | "no"')
    wishes = Reasoning(budget=budget)
    turn = ask("opened", (), response=response, reasoning=wishes)
    assert accepts("opened", turn, "Hm, yes or no?</think>\n\nyes")
    assert not accepts("opened", turn, "Hm.</think>\n\nwell")
    assert not accepts("opened", turn, "yes")
    turn = ask("thinking", (), response=response, reasoning=wishes)
    assert accepts("thinking", turn, "<think>\nHm, yes or no?\n</think>\n\nyes")
    assert accepts("thinking", turn, "yes")
    assert not accepts("thinking", turn, "Hm")
    turn = ask("opened", [WEATHER], response=response, reasoning=wishes)
    call = written("hermes").replace('{"city": "Róma {\\"}", "days": 3}', '{"city":"a","days":3}')
    assert accepts("opened", turn, f"Hm, yes or no?</think>{call}")


IN_TAGS = {
    "type": "object",
    "additionalProperties": False,
    "$defs": {"point": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
    "properties": {
        "at": {"$ref": "#/$defs/point"},
        "code": {"type": "string", "pattern": "^[a-c]/{2}$"},
        "note": {"type": "string", "minLength": 2, "maxLength": 4},
        "kind": {"enum": ["a", 1, None]},
        "size": {"const": 2.5},
        "maybe": {"type": ["string", "null"]},
    },
}
IN_TAGS["required"] = [*IN_TAGS["properties"]]
ARGUMENTS = {"at": "[1,2]", "code": "b//", "note": "a\n</", "kind": "1", "size": "2.5"}


def call_in_tags(**arguments: str) -> str:
    each = {**ARGUMENTS, "maybe": "null", **arguments}.items()
    written = "".join(f"<parameter={name}>\n{text}\n</parameter>\n" for name, text in each)
    return f"<tool_call>\n<function=f>\n{written}</function>\n</tool_call>"


@pytest.mark.parametrize("strict", [True, False])
def test_arguments_in_tags_keep_their_schema(strict):
    """As those do that are written as JSON, strict or not."""
    turn = ask("coder", [Tool("f", parameters=IN_TAGS, strict=strict)], choice=REQUIRED)
    assert accepts("coder", turn, call_in_tags())
    ((_, arguments),) = assembled(read("coder", [encode("coder", call_in_tags())], turn))["calls"]
    jsonschema.validate(json.loads(arguments), IN_TAGS)
    assert json.loads(arguments)["at"] == [1, 2]
    for name, text in {
        "at": "here", "code": "d//", "note": "a\nbcd", "kind": "b", "size": "2"
    }.items():  # fmt: skip
        assert not accepts("coder", turn, call_in_tags(**{name: text})), name
    assert not accepts("coder", turn, call_in_tags(note="a"))
    assert accepts("coder", turn, call_in_tags(maybe="any text"))


def test_what_cannot_be_enforced_in_tags_is_refused_where_it_is_strict():
    schema = {**CLOSED, "properties": {"a": {"type": "string", "format": "date"}}}
    ask("coder", [Tool("f", parameters=schema)], choice=REQUIRED)
    with pytest.raises(RequestError, match="'format' at '/properties/a/format'"):
        ask("coder", [Tool("f", parameters=schema, strict=True)])
    with pytest.raises(RequestError, match="additionalProperties"):
        ask("coder", [Tool("f", parameters={"type": "object", "properties": {}}, strict=True)])
