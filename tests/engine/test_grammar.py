"""Grammars: what is taken, what is refused and how, and that no token gets past a matcher."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from fakes import ByteTokenizer, FakeMetrics, FakeRunner, allowed

from ruvon import grammars
from ruvon.config import EngineConfig
from ruvon.engine import grammar as compiling
from ruvon.engine import grammar_errors, grammar_process
from ruvon.engine.engine import Engine
from ruvon.engine.grammar import Grammars
from ruvon.engine.grammar_errors import MOST_TRIALS
from ruvon.engine.loop import EngineLoop
from ruvon.engine.matching import EXHAUSTED, REFUSED, Matchers, Matching, withhold
from ruvon.engine.preparation import NotCompiledError
from ruvon.engine.types import Job, SamplingParams, SamplingRow, StepResult
from ruvon.errors import RequestError, UnavailableError
from ruvon.grammars import Grammar

EOS = ByteTokenizer.eos_ids


@pytest.fixture(scope="module")
def compiler():
    made = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size + 3, EOS)  # a head with padding
    yield made
    made.close()


def accepts(compiler: Grammars, grammar: Grammar, text: str) -> bool:
    matcher = compiler.matcher(grammar)
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


def refusal(compiler: Grammars, make) -> RequestError:
    with pytest.raises(RequestError) as refused:
        compiler.hold(make())
    return refused.value


# ------------------------------------------------------------------------------ what is taken

TAKEN = (
    (grammars.json_object(), ['{"a":[1,{}]}', "{}"], ['{"a": 1}', "[]", "{}\n", " {}"]),
    (grammars.json_schema(True), ["1", '"x"'], ["1 ", "nul"]),
    (grammars.json_schema({"x-guidance": {"whitespace_flexible": True}}), ["[1]"], ["[1 ]"]),
    (grammars.json_schema({"enum": ["é/\n", None]}), ["null", '"é/\\n"'], ['"é"']),
    (grammars.regex("a/b[0-9]+"), ["a/b12"], ["a/b", "xa/b1", "a/b1x"]),
    (grammars.regex("^a|b$"), ["a", "b"], ["ab"]),
    (grammars.choice(["a", "ab", '"\\\n', "日本"]), ["a", "ab", '"\\\n', "日本"], ["", "b", "日"]),
    (grammars.lark('start: A b\nA: "x" | "}"\nb: A*'), ["x", "}x}"], ["", "y"]),
    (grammars.gbnf('root ::= "a" b # c\nb ::= [x-z\\u00e9]{2,3}'), ["axx", "aéz"], ["ax", "b"]),
    (grammars.grammar('root ::= "\\u0022"'), ['"'], ["'"]),
    (grammars.grammar('start: ":"'), [":"], [""]),
)


@pytest.mark.parametrize(("grammar", "good", "bad"), TAKEN, ids=lambda value: str(value)[:40])
def test_what_matches(compiler, grammar, good, bad):
    for text in good:
        assert accepts(compiler, grammar, text), text
    for text in bad:
        assert not accepts(compiler, grammar, text), text


def test_grammars_are_parts_of_others(compiler):
    call = grammars.json_schema({"enum": [1]})
    rule = grammars.lark('start: X\nX: "x"')
    whole = Grammar('"<call>" one two "</call>"', f"one: {call.start}\ntwo: {rule.start}\n")
    assert accepts(compiler, whole, "<call>1x</call>")
    assert not accepts(compiler, whole, "<call>x1</call>")


def test_padding_and_special_tokens_are_never_allowed(compiler):
    mask = compiler.matcher(grammars.regex("(.|\n)*")).compute_bitmask()
    tokens = allowed(np.frombuffer(mask, dtype=np.int32))
    assert {*EOS} <= {*tokens}
    assert max(tokens) < ByteTokenizer.vocab_size
    assert not {*tokens} & (ByteTokenizer.special_ids - {*EOS})


# ------------------------------------------------------------------------------ what is refused

DEEP: dict = {}
for _ in range(50_000):
    DEEP = {"items": DEEP}

SCHEMAS = (
    ({"properties": {"a/b": {"contains": {}}}}, "contains", "/properties/a~1b/contains"),
    ({"items": {"not": {"type": "string"}}}, "not", "/items/not"),
    ({"anyOf": [{"type": "string"}, {"uniqueItems": True}]}, "uniqueItems", "/anyOf/1/uniqueItems"),
    ({"properties": {"x": {"$ref": "http://a.b/c"}}}, "$ref", "/properties/x/$ref"),
    ({"$ref": "#/$defs/none"}, "$ref", "/$ref"),
    ({"$defs": {"p": {"type": "string", "pattern": "(?=a)"}}, "$ref": "#/$defs/p"},
     "pattern", "/$defs/p/pattern"),
    ({"prefixItems": [{"type": "string", "format": "odd"}]}, "format", "/prefixItems/0/format"),
    ({"oneOf": [{"type": "object"}, {"type": "object"}]}, "oneOf", "/oneOf"),
    ({"type": "thing"}, "type", "/type"),
    ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength", "/minLength"),
    ({"enum": []}, "enum", "/enum"),
    ({"if": {}, "then": {}}, "if", "/if"),
)  # fmt: skip


@pytest.mark.parametrize(("schema", "keyword", "pointer"), SCHEMAS, ids=str)
def test_a_schema_is_refused_by_keyword_and_pointer(compiler, schema, keyword, pointer):
    def make() -> Grammar:
        return grammars.json_schema(schema, param="tools[1].parameters")

    error = refusal(compiler, make)
    assert error.param == "tools[1].parameters"
    assert f"'{keyword}' at '{pointer}'" in error.message
    assert error.message == refusal(compiler, make).message  # remembered


CLOSED = {"type": "object", "additionalProperties": False}
NESTED: dict = {"type": "string"}
for _ in range(11):
    NESTED = {**CLOSED, "properties": {"a": NESTED}, "required": ["a"]}
STRICT = (
    ({"type": "string"}, "type", ""),
    ({"anyOf": [CLOSED]}, "type", ""),
    ({"type": "object"}, "additionalProperties", ""),
    ({**CLOSED, "properties": {"a": {}}}, "required", ""),
    ({**CLOSED, "properties": {"a": {"type": ["object", "null"]}}, "required": ["a"]},
     "additionalProperties", "/properties/a"),
    ({**CLOSED, "$defs": {"d": {"properties": {}}}}, "additionalProperties", "/$defs/d"),
    (NESTED, "properties", "/properties/a" * 11),
    ({**CLOSED, "properties": {"a": {"enum": [*range(1001)]}}, "required": ["a"]},
     "enum", "/properties/a"),
    ({**CLOSED, "properties": (many := {f"k{i}": {} for i in range(5001)}), "required": [*many]},
     "properties", ""),
)  # fmt: skip


@pytest.mark.parametrize(("schema", "keyword", "pointer"), STRICT, ids=lambda it: str(it)[:50])
def test_rules_of_strict_schemas(schema, keyword, pointer):
    with pytest.raises(RequestError, match="strict") as refused:
        grammars.json_schema(schema, strict=True)
    assert f"'{keyword}' at '{pointer}/{keyword}'" in refused.value.message
    grammars.json_schema(schema)


def test_what_an_array_holds_counts_once():
    schema = {"type": "array", "items": {"enum": [*range(600)]}}
    schema = {**CLOSED, "properties": {"a": {"items": schema}}, "required": ["a"]}
    grammars.json_schema(schema, strict=True)
    pointers = [place.pointer for place in grammars.places(schema)]
    assert [at for at in pointers if "additional" not in at] == [
        "", "/properties/a", "/properties/a/items", "/properties/a/items/items"
    ]  # fmt: skip


def test_a_strict_schema_that_keeps_the_rules(compiler):
    inner = {**CLOSED, "properties": {"x": {"type": ["string", "null"]}}, "required": ["x"]}
    schema = {**CLOSED, "properties": {"a": {"items": {"$ref": "#/$defs/i"}, "type": "array"}},
              "required": ["a"], "$defs": {"i": inner}}  # fmt: skip
    assert accepts(compiler, grammars.json_schema(schema, strict=True), '{"a":[{"x":null}]}')


@pytest.mark.parametrize(
    "make",
    [
        lambda: grammars.json_schema(DEEP),
        lambda: grammars.json_schema({"const": float("nan")}),
        lambda: grammars.json_schema([]),
        lambda: grammars.json_schema({"enum": ["x" * 2**20]}),
        lambda: grammars.regex("("),
        lambda: grammars.regex("(a)\\1"),
        lambda: grammars.regex(5),
        lambda: grammars.choice([]),
        lambda: grammars.choice(["\ud800"]),
        lambda: grammars.regex("\ud800"),
        lambda: grammars.lark('start: "\ud800"'),
        lambda: grammars.gbnf('root ::= "\ud800"'),
        lambda: grammars.lark("start: missing"),
        lambda: grammars.lark('start: "a" }'),
        lambda: grammars.lark("\x00"),
        lambda: grammars.gbnf("root ::= " + "(" * 10_000),
        lambda: grammars.gbnf('root ::= "a'),
        lambda: grammars.gbnf("root ::= other"),
        lambda: grammars.gbnf("a ::= b\n" * 1001),
        lambda: grammars.gbnf("root ::= \\"),
    ],
)
def test_nonsense_is_the_clients_fault(compiler, make):
    error = refusal(compiler, make)
    assert error.param
    assert len(error.message) < 500


def test_an_error_is_not_looked_for_in_every_schema_of_many(compiler, monkeypatch):
    """Other grammars wait meanwhile."""
    tried, error_of = [], compiler._trial.error_of
    monkeypatch.setattr(
        compiler._trial, "error_of", lambda text: tried.append(text) or error_of(text)
    )
    rules = "".join(f"r{i}: %json {{}}\n" for i in range(500))
    error = refusal(compiler, lambda: grammars.lark(f"start: missing\n{rules}"))
    assert "missing" in error.message
    assert len(tried) == MOST_TRIALS + 1


MALICIOUS = {
    "rules that end a process": "\n".join(
        ["start: %lark { start: r0", *(f"r{i}: r{i + 1}" for i in range(30_000)), 'r30000: "a"\n}']
    ),
    "an automaton of a million states": 'start: %json {"type":"integer","multipleOf":1000003}',
    "their least common multiple": 'start: %json {"allOf":[{"type":"integer","multipleOf":997},'
    '{"multipleOf":991}]}',
    "a million letters": "start: /(a{1000}){1000}/",
    "a terminal that doubles": "\n".join(
        ["start: R0", *(f"R{i}: R{i + 1} R{i + 1}" for i in range(40)), 'R40: "a"']
    ),
    "parentheses": "start: " + "(" * 100_000 + '"a"' + ")" * 100_000,
    "a regex of parentheses": "start: /" + "(" * 10_000 + "a" + ")" * 10_000 + "/",
    "nested arrays": "start: %json " + '{"items":' * 100_000 + "{}" + "}" * 100_000,
    "references in a circle": 'start: %json {"$ref":"#"}',
    "a chain of references": "start: %json "
    + json.dumps(
        {
            "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(20_000)},
            "$ref": "#/$defs/d0",
        }
    ),
    "an exponential regex": "start: /((a|b)*c){100}(a|b)*a(a|b){200}/",
    "repeated repetition": "start: /((a{0,100}){0,100}){0,100}/",
    "endless arrays": 'start: %json {"type":"array","items":{"type":"null"},"minItems":1000000000}',
    "a long string": 'start: %json {"type":"string","minLength":1000000,"maxLength":100000000}',
    "an enum of thousands": "start: %json "
    + json.dumps({"enum": [f"value {i}" for i in range(9000)]}),
    "many alternatives": "start: %json "
    + json.dumps(
        {"allOf": [{"anyOf": [{"minLength": i + j} for j in range(10)]} for i in range(8)]}
    ),
}


@pytest.mark.parametrize("text", MALICIOUS.values(), ids=MALICIOUS)
def test_what_wants_to_do_harm_is_refused_or_works(text):
    """In bounded time, and while other threads go on: here and in the steps that follow. On a
    machine that is busy with other things it may have to be asked for again."""
    compiler = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size, EOS)
    grammar, turns, over = Grammar(text.removeprefix("start: "), param="p"), [], threading.Event()

    def count_turns() -> None:
        while not over.wait(0.001):
            turns.append(time.thread_time())

    beside = threading.Thread(target=count_turns)
    beside.start()
    began = time.process_time()
    try:
        with suppress(RequestError, UnavailableError):
            compiler.hold(grammar)
            take_some_steps(compiler, grammar)
    finally:
        over.set()
        beside.join()
        compiler.close()
    assert time.process_time() - began < 10  # the trial's own second is another process's
    assert turns or time.process_time() - began < 0.05


def take_some_steps(compiler: Grammars, grammar: Grammar, steps: int = 20) -> None:
    matchers = Matchers(compiler)
    row = SamplingRow(1, SamplingParams(grammar=grammar), [1], 1, 0)
    for _ in range(steps):
        masks = matchers.begin({0: row})
        mask = masks.wait()[0]
        if masks.errors:  # that sequence fails alone
            break
        token = allowed(mask)[0]
        result = matchers.accept([1], masks, StepResult(((token,),), (None,)))
        row.history += result.tokens[0]
        if result.ended or token in EOS:
            break
    matchers.close()


# ------------------------------------------------------------------------------ beside a runner


@pytest.fixture
def matchers(compiler):
    made = Matchers(compiler)
    yield made
    made.close()


def test_a_token_that_was_not_allowed_fails_its_sequence_alone(matchers):
    sampling = SamplingParams(grammar=grammars.regex("ab+"))
    first, last = (SamplingRow(seq_id, sampling, [1], 1, 0) for seq_id in (7, 9))
    masks = matchers.begin({0: first, 2: last})
    sampled = StepResult(((98,), (5,), (97,)), (None,) * 3)
    result = matchers.accept([7, 8, 9], masks, sampled)
    assert result.tokens == ((), (5,), (97, 98))  # one is forced
    assert result.errors == {7: REFUSED}
    assert not result.ended


def test_a_token_behind_which_a_grammar_is_too_costly_fails_its_sequence_alone(matchers):
    """Not by the words for one that was not allowed; what must follow the third is looked for."""
    sampling = SamplingParams(grammar=grammars.regex("[ab][ab][ab]c{200000}"))
    first, second = (SamplingRow(seq_id, sampling, [1], 1, 0) for seq_id in (7, 8))
    second.sampling = SamplingParams(grammar=grammars.regex("ab"))
    for _ in range(2):
        masks = matchers.begin({0: first})
        result = matchers.accept([7], masks, StepResult(((97,),), (None,)))
        assert (result.tokens, result.errors) == (((97,),), {})
        first.history += [97]
    masks = matchers.begin({0: first, 1: second})
    result = matchers.accept([7, 8], masks, StepResult(((97,), (97,)), (None,) * 2))
    assert (result.tokens, result.errors) == (((), (97, 98)), {7: EXHAUSTED})


@pytest.mark.parametrize("text", ["/a{200000}/", '"a"~300000', "/(ab){200000}/", "/ba{200000}c/"])
def test_a_grammar_that_cannot_take_a_step_is_refused(compiler, text):
    with pytest.raises(RequestError, match="Invalid grammar for p"):
        compiler.hold(Grammar(text, param="p"))


def test_a_grammar_that_does_not_compile_any_more_fails_its_sequence_alone(matchers):
    """As when it was forgotten, and the machine has no time for another trial."""
    broken, sound = (SamplingParams(grammar=Grammar(start)) for start in ('"a', '"b"'))
    rows = {0: SamplingRow(7, broken, [1], 1, 0), 1: SamplingRow(8, sound, [1], 1, 0)}
    masks = matchers.begin(rows)
    result = matchers.accept([7, 8], masks, StepResult(((97,), (98,)), (None,) * 2))
    assert [*result.errors] == [7]
    assert result.tokens[0] == ()
    assert result.tokens[1][0] == 98


def test_where_no_process_can_be_had_grammars_that_are_known_go_on(monkeypatch):
    compiler = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size, EOS)
    known, forgotten = (SamplingParams(grammar=Grammar(start)) for start in ('"b"', '"a"'))
    compiler.hold(known.grammar)
    compiler.close()
    monkeypatch.setattr(grammar_process.sys, "executable", "/not/there")
    matchers = Matchers(compiler)
    rows = {0: SamplingRow(7, forgotten, [1], 1, 0), 1: SamplingRow(8, known, [1], 1, 0)}
    assert [*matchers.begin(rows).errors] == [7]
    matchers.close()


def test_a_grammar_that_breaks_behind_a_token_is_not_complete(matchers, monkeypatch):
    row = SamplingRow(7, SamplingParams(grammar=Grammar('"ab" "c"*')), [1], 1, 0)
    masks = matchers.begin({0: row})
    assert not masks.errors

    def accept(matching: Matching, token: int) -> tuple[int, ...]:
        matching.matcher.consume_tokens([token, ord("x")])
        assert matching.matcher.is_stopped()
        return (token,)

    monkeypatch.setattr(Matching, "accept", accept)
    result = matchers.accept([7], masks, StepResult(((97,),), (None,)))
    assert (result.tokens, [*result.errors]) == (((),), [7])
    assert not result.ended


def test_a_sequence_is_found_again_by_its_history(matchers):
    row = SamplingRow(7, SamplingParams(grammar=grammars.choice(["abcd", "abxy"])), [1], 1, 0)
    row.history += b"ab"
    assert allowed(matchers.begin({0: row}).wait()[0]) == [*b"cx"]
    row.history[1:] = b"a"  # as if begun anew
    assert allowed(matchers.begin({0: row}).wait()[0]) == [*b"b"]


def test_tokens_are_withheld_as_long_as_there_are_others():
    masks = np.array([[0b1010, 1], [0b1010, 1], [0b10, 0]], dtype=np.int32)
    withhold(masks, {0: [1, 32, 999], 2: [1]})
    assert [allowed(mask) for mask in masks] == [[3], [1, 3, 32], [1]]
    withhold(masks, {0: [3], 1: [3]})
    assert [allowed(mask) for mask in masks] == [[3], [1, 32], [1]]


def test_many_masks_at_once(compiler):
    matchers = Matchers(compiler, threads=2)
    rows = {
        i: SamplingRow(i, SamplingParams(grammar=grammars.choice([chr(97 + i)])), [1], 1, 0)
        for i in range(9)
    }
    masks = matchers.begin(rows).wait()
    assert [allowed(mask) for mask in masks] == [[97 + i] for i in range(9)]
    matchers.close()


def test_streams_of_one_grammar_do_not_wait_for_each_other(compiler):
    """Each gets a compilation of its own, as soon as there are enough, and goes on with it."""
    grammar = grammars.json_schema({"type": "string", "maxLength": 20, "title": "of many"})
    matchers = Matchers(compiler, threads=3, at_once=False)
    rows = [SamplingRow(i, SamplingParams(grammar=grammar), [1], 1, 0) for i in range(6)]
    masks_RW = np.zeros((6, matchers.width), dtype=np.int32)
    for token in b'"abc':
        assert not matchers.fill(rows, masks_RW)
        for row in rows:
            assert matchers._matchings[row.seq_id].accept(token)
            row.history.append(token)
        compiler._multiplying.submit(int).result()  # what was to be made has been made
    matchings = matchers._matchings.values()
    assert sorted(matching.turn for matching in matchings) == [0, 0, 1, 1, 2, 2]
    assert compiler.has(grammar, 2)
    assert not compiler.has(grammar, 3)
    assert not any(matching.crowded for matching in matchings)
    matchers.close()


# ------------------------------------------------------------------------------ the cache


def test_the_cache_is_bounded_in_bytes(monkeypatch):
    compiler = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size, EOS)
    first = grammars.choice(["first"])
    monkeypatch.setattr(compiling, "CACHE_BYTES", 4 * compiling.size_of(first.lark()))
    compiler.hold(first)
    for i in range(8):
        compiler.hold(grammars.choice([f"other {i}"]))
    assert not compiler.is_known(first)
    assert compiler.is_known(grammars.choice(["other 7"]))
    compiler.matcher(grammars.choice(["other 7"]), turn=1)
    compiler._multiplying.submit(int).result()
    assert compiler.has(grammars.choice(["other 7"]), 1)
    compiler.hold(grammars.choice(["other 8"]))
    assert compiler._num_bytes <= compiling.CACHE_BYTES
    assert accepts(compiler, first, "first")
    compiler.close()


def test_what_a_request_holds_is_not_forgotten(monkeypatch):
    compiler = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size, EOS)
    first, second = grammars.choice(["first"]), grammars.choice(["second"])
    monkeypatch.setattr(compiling, "CACHE_BYTES", 1)  # the latest alone is kept
    held = compiler.hold(first)
    compiler.hold(second)
    assert compiler.is_known(first)
    assert compiler.hold(first) is held  # and so is not compiled again
    compiler.hold(second)
    monkeypatch.setattr(compiling, "HELD_BYTES", 1)
    assert compiler.hold(first) is None
    compiler.hold(second)
    del held
    assert not compiler.is_known(first)
    compiler.close()


def test_a_job_holds_its_grammar_until_its_sequences_end(monkeypatch):
    compiler = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size, EOS)
    monkeypatch.setattr(compiling, "CACHE_BYTES", 1)
    engine = Engine(
        FakeRunner(), EngineConfig(), max_model_len=64, num_blocks=8, vocab_size=300,
        grammars=compiler,
    )  # fmt: skip
    grammar = grammars.choice(["waits"])
    ids = engine.add(engine.prepare(Job((1,), SamplingParams(grammar=grammar))), 0.0)
    compiler.hold(grammars.choice(["other"]))
    assert compiler.is_known(grammar)
    engine.abort(ids)
    assert not compiler.is_known(grammar)
    compiler.close()


def test_no_step_is_launched_ahead_where_forced_tokens_come_with_the_one_before(compiler):
    """As long as there is a sequence with a grammar, and no longer."""
    runner = FakeRunner(depth=2, grammar_depth=1, by_hand=True, matchers=Matchers(compiler))
    engine = Engine(
        runner, EngineConfig(), max_model_len=64, num_blocks=8, vocab_size=300, grammars=compiler
    )
    grammar = grammars.choice(["waits"])
    bound = engine.add(engine.prepare(Job((1,), SamplingParams(grammar=grammar))), 0.0)
    engine.add(Job((1,), SamplingParams(max_tokens=9)), 0.0)
    step = engine.launch(0.0)
    assert engine.launch(0.0) is None
    runner.finish_step()
    engine.collect(step)
    engine.abort(bound)
    assert engine.launch(0.0) is not None
    assert engine.launch(0.0) is not None


@pytest.mark.parametrize("ended_by", [TimeoutError(), "the system"])
def test_a_machine_without_time_is_no_fault_of_a_grammar(monkeypatch, ended_by):
    """It is refused as what may be tried again, and is."""
    compiler = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size, EOS)
    compiler.hold(grammars.json_object())
    trial = compiler._trial

    def receive(process) -> str:
        if ended_by == "the system":
            process.kill()
            raise EOFError
        raise ended_by

    grammar = grammars.choice(["in time"])
    with monkeypatch.context() as patched:
        patched.setattr(grammar_process, "receive", receive)
        with pytest.raises(UnavailableError, match="again"):
            compiler.hold(grammar)
    assert trial._process is None
    assert not compiler.is_known(grammar)
    assert compiler.hold(grammar)
    compiler.close()


def test_a_search_for_what_is_at_fault_ends(compiler, monkeypatch):
    monkeypatch.setattr(grammar_errors, "SEARCH_SECONDS", 0.0)
    error = refusal(compiler, lambda: grammars.json_schema({"items": {"not": {}}}, param="p"))
    assert error.message.startswith("Invalid grammar for p: ")


def test_one_grammar_from_many_threads(compiler):
    grammar, failures = grammars.choice(["from many threads", "at once"]), []

    def use() -> None:
        failures.extend(i for i in range(20) if not accepts(compiler, grammar, "at once"))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


async def test_what_takes_long_is_compiled_before_a_job_is_prepared(compiler):
    engine = Engine(
        FakeRunner(), EngineConfig(), max_model_len=64, num_blocks=8, vocab_size=300,
        grammars=compiler,
    )  # fmt: skip
    loop = EngineLoop(engine, FakeMetrics())
    loop.start()
    job = Job((1,), SamplingParams(grammar=grammars.choice(["not seen before"])))
    with pytest.raises(NotCompiledError) as refused:
        loop.preparation.prepare_quickly(job)
    assert refused.value.grammars == [job.sampling.grammar]
    held = await asyncio.to_thread(loop.preparation.compile, refused.value.grammars)
    assert loop.preparation.prepare_quickly(job).held is held[0]
    await loop.stop(0)


async def test_why_a_grammar_does_not_compile_says_whoever_asks_for_it(compiler):
    engine = Engine(
        FakeRunner(), EngineConfig(), max_model_len=64, num_blocks=8, vocab_size=300,
        grammars=compiler,
    )  # fmt: skip
    loop = EngineLoop(engine, FakeMetrics())
    job = Job((1,), SamplingParams(grammar=grammars.lark("start: nowhere")))
    assert loop.preparation.compile([job.sampling.grammar]) == []
    with pytest.raises(RequestError, match="nowhere"):
        loop.preparation.prepare_quickly(job)


def test_a_machine_without_files_for_a_process_may_be_asked_again(monkeypatch):
    def no_files(*_args, **_settings):
        raise OSError(errno.EMFILE, "Too many open files")

    compiler = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size, EOS)
    with monkeypatch.context() as patch:
        patch.setattr(grammar_process.subprocess, "Popen", no_files)
        with pytest.raises(UnavailableError, match="no room"):
            compiler.hold(grammars.regex("a+"))
    assert compiler.hold(grammars.regex("a+"))
    compiler.close()


@pytest.mark.parametrize("program", ["/bin/false", "/not/there"])
def test_a_process_that_does_not_start_is_no_fault_of_a_grammar(monkeypatch, program):
    compiler = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size, EOS)
    monkeypatch.setattr(grammar_process.sys, "executable", program)
    with pytest.raises(RuntimeError, match="does not start"):
        compiler.hold(grammars.json_object())
    monkeypatch.undo()
    compiler.hold(grammars.json_object())
    compiler.close()


def test_a_process_that_starts_slowly_is_waited_for_by_the_next_request(monkeypatch):
    compiler = Grammars(ByteTokenizer(), ByteTokenizer.vocab_size, EOS)
    monkeypatch.setattr(grammar_process, "PATIENCE", 0)
    with pytest.raises(UnavailableError, match="no time"):
        compiler.hold(grammars.json_object())
    starting = compiler._trial._process
    monkeypatch.undo()
    compiler.hold(grammars.json_object())
    assert compiler._trial._process is starting
    compiler.close()


def test_an_engine_without_grammars_refuses_them_by_name():
    engine = Engine(None, EngineConfig(), max_model_len=64, num_blocks=8, vocab_size=300)
    with pytest.raises(RequestError) as refused:
        engine.prepare(Job((1,), SamplingParams(grammar=grammars.json_object("text.format"))))
    assert refused.value.param == "text.format"
