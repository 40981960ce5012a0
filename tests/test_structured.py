"""Structured output of the embedded model: what it writes validates, whatever else is asked."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from embedded import needs_model

from ruvon import LLM, SamplingParams, grammars
from ruvon.errors import RequestError

SCHEMAS = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "schemas.py"))["schemas"]

pytestmark = needs_model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["customer", "employee"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
PROMPT = "A person as JSON: "
GREEDY = SamplingParams(temperature=0, max_tokens=60)


@pytest.fixture(scope="module")
def llm():
    with LLM(kv_cache_memory="64MiB", max_num_seqs=16) as made:
        yield made


def validate(schema: object, text: str) -> None:
    draft = jsonschema.Draft202012Validator
    draft(schema, format_checker=draft.FORMAT_CHECKER).validate(json.loads(text))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_schemas_of_all_kinds(llm, temperature):
    """A part of what bench/structured.py asks for."""
    schemas = [schema for _, schema in SCHEMAS(28, seed=int(temperature))]
    asked = [
        SamplingParams(
            temperature=temperature, max_tokens=32, seed=i, grammar=grammars.json_schema(schema)
        )
        for i, schema in enumerate(schemas)
    ]
    answers = llm.generate([PROMPT] * len(asked), asked, use_tqdm=False)
    finishes = [completion.finish_reason for (completion,) in answers]
    for schema, (completion,) in zip(schemas, answers, strict=True):
        if completion.finish_reason == "stop":
            validate(schema, completion.text)
    assert {*finishes} <= {"stop", "length"}
    assert finishes.count("stop") > 15


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logprobs": 2},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.1},
        {"temperature": 1.2, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 4},
        {"temperature": 1, "typical_p": 0.9, "seed": 4},
        {"temperature": 1, "seed": 4, "logprobs": 0, "bad_words": ((34,),)},
        {"min_tokens": 200, "max_tokens": 250},
        {"ignore_eos": True, "logit_bias": {2: 100.0}},
    ],
    ids=str,
)
def test_whatever_is_asked_for_beside(llm, options):
    sampling = replace(GREEDY, grammar=grammars.json_schema(PERSON, strict=True), **options)
    completions = llm.generate([PROMPT], sampling, n=2, use_tqdm=False)[0]
    for completion in completions:
        assert completion.finish_reason == "stop"
        validate(PERSON, completion.text)
        assert completion.text == json.dumps(json.loads(completion.text), separators=(",", ":"))
        if sampling.logprobs is not None:
            assert [each.token for each in completion.logprobs] == [*completion.tokens]


def test_logprobs_are_the_models_own(llm):
    """Not those of what the grammar leaves."""
    grammar = grammars.choice(["{", "Q"])
    ((ruled,),) = llm.generate(
        ["The sea is"], replace(GREEDY, grammar=grammar, logprobs=1), use_tqdm=False
    )
    free = llm.generate(["The sea is"], replace(GREEDY, max_tokens=1, logprobs=1), use_tqdm=False)
    ((token, logprob),) = free[0][0].logprobs[0].top
    assert ruled.logprobs[0].top == ((token, pytest.approx(logprob, abs=1e-4)),)
    assert ruled.logprobs[0].logprob < -2


def test_forced_tokens_take_fewer_steps_and_streams_beside_are_the_same(llm):
    free = replace(GREEDY, max_tokens=24)
    ruled = replace(GREEDY, grammar=grammars.json_schema(PERSON))
    alone = llm.generate(["The sea is"], free, use_tqdm=False)[0][0]
    before = llm.engine.stats.step
    person = llm.generate([PROMPT], ruled, use_tqdm=False)[0][0]
    if llm.engine._runner.grammar_depth == 1:  # where steps overlap, forced tokens come one by one
        assert llm.engine.stats.step - before < len(person.tokens)
    both = llm.generate(["The sea is", PROMPT], [free, ruled], use_tqdm=False)
    assert both[0][0].tokens == alone.tokens
    assert both[1][0].tokens == person.tokens


def test_kinds_of_grammars(llm):
    wanted = {
        r"[0-9]{3}-[a-f]{2}": grammars.regex("[0-9]{3}-[a-f]{2}"),
        r"yes|no": grammars.choice(["yes", "no"]),
        r"Hello [A-Z][a-z]{1,5}!": grammars.lark('start: "Hello " N "!"\nN: /[A-Z][a-z]{1,5}/'),
        r"x[0-9]{2}": grammars.gbnf('root ::= "x" [0-9]{2}'),
    }
    answers = llm.generate(
        [PROMPT] * 4, [replace(GREEDY, grammar=each) for each in wanted.values()], use_tqdm=False
    )
    for pattern, (completion,) in zip(wanted, answers, strict=True):
        assert re.fullmatch(pattern, completion.text)
        assert completion.finish_reason == "stop"


def test_what_is_cut_off_says_so(llm):
    sampling = replace(GREEDY, max_tokens=5, grammar=grammars.json_schema(PERSON))
    completion = llm.generate([PROMPT], sampling, use_tqdm=False)[0][0]
    assert (completion.finish_reason, len(completion.tokens)) == ("length", 5)


def test_a_schema_that_cannot_be_served_is_refused_before_anything_runs(llm):
    with pytest.raises(RequestError, match="'not' at '/not'"):
        llm.generate([PROMPT], replace(GREEDY, grammar=grammars.json_schema({"not": {}})))
    assert not llm.engine.has_work
