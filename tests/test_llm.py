"""The offline front door: over a fake runner, then over the default model."""

import asyncio
import json
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import torch
from fakes import ByteTokenizer, FakeRunner
from structlog.testing import capture_logs

from ruvon import LLM, SamplingParams, TextOptions
from ruvon.deltas import Delta
from ruvon.engine.detokenizer import Detokenizer
from ruvon.errors import ConfigError, ContextLengthError, EngineDeadError, RequestError
from ruvon.models.chat import PlainParser, Turn

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = ["one", "two and three", "four", "a longer prompt than the others, by far"]


class Chat:
    """Renders messages one after the other."""

    def turn(self, messages, **options):
        prompt = [token for message in messages for token in message["content"].encode()]
        return Turn(tuple(prompt), PlainParser)


@pytest.fixture
def runner():
    return FakeRunner(16)


@pytest.fixture
def fake(make_engine, runner):
    """An LLM without a model."""
    closed = []
    loaded = SimpleNamespace(
        engine=make_engine(runner, max_num_queued_reqs=3, max_num_seqs=2),
        tokenizer=ByteTokenizer(),
        chat=Chat(),
        defaults={"top_k": 3, "temperature": 0.7},
        close=lambda: closed.append(True),
    )
    with LLM.over(loaded) as llm:
        yield llm
    assert closed
    assert not llm.engine.has_work
    assert llm.engine._scheduler.pool.num_free == 64


def test_completions_come_in_the_order_of_prompts(fake):
    """More prompts than the queue may hold: the rest is fed in as room appears."""
    prompts = [f"prompt {n}" for n in range(20)]
    together = fake.generate(prompts, GREEDY, n=2, use_tqdm=False)
    assert [len(completions) for completions in together] == [2] * 20
    assert [one.index for one in together[7]] == [0, 1]
    for prompt, completions in zip(prompts, together, strict=True):
        ((alone,),) = fake.generate(prompt, GREEDY, use_tqdm=False)
        assert alone.text == completions[0].text == completions[1].text
        assert alone.tokens == completions[0].tokens
        assert len(alone.tokens) == 12
        assert alone.text == bytes(alone.tokens).decode()
        assert alone.finish_reason == "length"
        assert alone.num_prompt == len(prompt) + 1  # and bos


def test_prompts_may_be_ids_and_one_prompt_needs_no_list(fake):
    ((text,),) = fake.generate("hello", GREEDY, use_tqdm=False)
    ids = [256, *b"hello"]
    ((one,),) = fake.generate(ids, GREEDY, use_tqdm=False)
    ((listed,),) = fake.generate([ids], GREEDY, use_tqdm=False)
    ((mixed,), _) = fake.generate([ids, "hello"], GREEDY, use_tqdm=False)
    assert text.tokens == one.tokens == listed.tokens == mixed.tokens
    with pytest.raises(RequestError, match="mix"):
        fake.generate([1, "hello"], GREEDY, use_tqdm=False)
    assert fake.generate([], GREEDY, use_tqdm=False) == []


def test_each_prompt_may_have_its_own_sampling(fake):
    lengths = [3, 5, 7]
    sampling = [SamplingParams(temperature=0, max_tokens=n) for n in lengths]
    results = fake.generate(PROMPTS[:3], sampling, use_tqdm=False)
    assert [len(one.tokens) for (one,) in results] == lengths
    with pytest.raises(RequestError, match="3 sampling for 2 prompts"):
        fake.generate(PROMPTS[:2], sampling, use_tqdm=False)


def test_a_stop_string_ends_a_completion_and_frees_its_blocks(fake):
    ((whole,),) = fake.generate(
        "tell", SamplingParams(temperature=0, max_tokens=60), use_tqdm=False
    )
    stop = whole.text[20:22]
    text = TextOptions(stop=(stop,))
    at = whole.text.index(stop)
    ((cut,),) = fake.generate(
        "tell", SamplingParams(temperature=0, max_tokens=60), text, use_tqdm=False
    )
    assert cut.text == whole.text[:at]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert len(cut.tokens) == at + 2


class AtMost:
    """A parser that has enough after some tokens."""

    def __init__(self, text, most):
        self.text, self.most = text, most

    def push(self, ids):
        said = ""
        for id in ids:
            said += self.text.push([id])
            if self.text.num_tokens == self.most:
                self.text.end()
        return [Delta(text=said)]

    def finish(self):
        return []


def test_a_parser_can_end_a_completion_each_its_own(fake):
    """What it did not read is not counted, and nothing stays in the engine."""
    sizes = iter([2, 5])
    fake.loaded.chat.turn = lambda messages, **options: Turn(
        (97, 98), partial(AtMost, most=next(sizes))
    )
    talk = [{"role": "user", "content": "ab"}]
    (first,), (second,) = fake.chat([talk, talk], GREEDY, use_tqdm=False)
    assert (len(first.tokens), len(second.tokens)) == (2, 5)
    assert second.text.startswith(first.text)
    assert (first.finish_reason, first.stop_reason) == ("stop", None)


def test_wishes_that_a_template_does_not_know_are_told(fake):
    fake.loaded.chat.turn = lambda messages, **options: Turn((97,), PlainParser, ignored=("x",))
    with capture_logs() as logs:
        fake.chat([{"role": "user", "content": "a"}], GREEDY, use_tqdm=False)
    assert [(entry["event"], entry["wishes"]) for entry in logs] == [("without_effect", ("x",))]


def test_a_stop_token_is_hidden_unless_wanted(fake):
    ((whole,),) = fake.generate("tell", GREEDY, use_tqdm=False)
    stop = whole.tokens[5]
    at = whole.tokens.index(stop)
    sampling = SamplingParams(temperature=0, stop_token_ids=(stop,))
    ((hidden,),) = fake.generate("tell", sampling, use_tqdm=False)
    ((shown,),) = fake.generate("tell", sampling, TextOptions(include_stop=True), use_tqdm=False)
    assert hidden.text == whole.text[:at]
    assert shown.text == whole.text[: at + 1]
    assert hidden.tokens == shown.tokens == whole.tokens[: at + 1]
    assert hidden.stop_reason == stop


def test_logprobs_come_with_tokens(fake):
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1)
    ((one,),) = fake.generate("hi", sampling, use_tqdm=False)
    assert [entry.token for entry in one.logprobs] == list(one.tokens)
    assert one.prompt_logprobs[0] is None
    assert [entry.token for entry in one.prompt_logprobs[1:]] == list(b"hi")
    ((plain,),) = fake.generate("hi", GREEDY, use_tqdm=False)
    assert plain.logprobs is None
    assert plain.prompt_logprobs is None


def test_the_models_sampling_defaults_apply_where_none_are_given(fake, monkeypatch):
    added, add = [], fake.engine.add
    monkeypatch.setattr(fake.engine, "add", lambda job, *rest: added.append(job) or add(job, *rest))
    fake.generate("one")
    fake.chat([{"role": "user", "content": "hi"}])
    fake.generate("one", SamplingParams(max_tokens=1))
    drawn = [(job.sampling.top_k, job.sampling.temperature) for job in added]
    assert drawn == [(3, 0.7), (3, 0.7), (0, 1.0)]
    assert [job.sampling.max_tokens for job in added][1:] == [None, 1]


def test_chat_takes_one_conversation_or_several(fake):
    talk = [{"role": "user", "content": "hello"}]
    other = [*talk, {"role": "assistant", "content": "yes"}]
    ((one,),) = fake.chat(talk, GREEDY, use_tqdm=False)
    (again,), (second,) = fake.chat([talk, other], GREEDY, use_tqdm=False)
    assert one.tokens == again.tokens
    assert second.num_prompt == len("helloyes")
    ((long,),) = fake.chat(talk, use_tqdm=False)
    assert long.num_prompt + len(long.tokens) == fake.engine.max_model_len


def test_what_cannot_run_is_refused_before_anything_runs(fake, runner):
    with pytest.raises(ContextLengthError):
        fake.generate(["short", "x" * 300], GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match="temperature"):
        fake.generate("short", SamplingParams(temperature=-1), use_tqdm=False)
    assert runner.plans == []


@pytest.mark.parametrize(
    "prompts", [None, 5, [None], b"ab", [b"ab"], {"prompt": "a"}, [{"prompt": "a"}], [["a"]], [1.5]]
)
def test_what_is_no_prompt_is_told_so(fake, runner, prompts):
    with pytest.raises(RequestError, match="a prompt must be a text or token ids, not "):
        fake.generate(prompts, GREEDY, use_tqdm=False)
    assert runner.plans == []


@pytest.mark.parametrize("messages", [None, "Hi", ["Hi"], {"role": "user", "content": "Hi"}, [[5]]])
def test_what_is_no_conversation_is_told_so(fake, runner, messages):
    with pytest.raises(RequestError, match="messages must be a list of dicts"):
        fake.chat(messages, GREEDY, use_tqdm=False)
    assert runner.plans == []


@pytest.mark.parametrize(
    "fields",
    [
        {"stop_token_ids": 5}, {"stop_token_ids": ["a"]}, {"allowed_token_ids": []},
        {"allowed_token_ids": [1.5]}, {"bad_words": ["word"]}, {"logit_bias": {"5": 1}},
        {"logit_bias": {5: "a"}}, {"logit_bias": [5]}, {"grammar": "a+"},
    ],
)  # fmt: skip
def test_what_a_field_of_sampling_cannot_be_is_told_by_its_name(fake, runner, fields):
    with pytest.raises(RequestError) as told:
        fake.generate("a", SamplingParams(**fields), use_tqdm=False)
    assert told.value.param in fields
    assert runner.plans == []


@pytest.mark.parametrize("sampling", [{"temperature": 0}, [{"temperature": 0}], "greedy"])
def test_what_is_no_sampling_is_told_so(fake, sampling):
    for ask in (fake.generate, fake.chat):
        with pytest.raises(RequestError, match="sampling"):
            ask([{"role": "user", "content": "a"}] if ask == fake.chat else "a", sampling)


def test_one_stop_string_is_not_its_letters(fake):
    with pytest.raises(RequestError, match="stop must be a list of strings, not 'end'"):
        fake.generate("a", GREEDY, TextOptions(stop="end"), use_tqdm=False)
    assert not fake.engine.has_work


def test_prompts_may_come_from_a_generator_and_ids_from_numpy(fake):
    texts = fake.generate((text for text in ("a", "b")), GREEDY, use_tqdm=False)
    assert texts == fake.generate(["a", "b"], GREEDY, use_tqdm=False)
    one = fake.generate(np.array([97]), GREEDY, use_tqdm=False)
    assert one == fake.generate([[97]], GREEDY, use_tqdm=False)


def test_a_failed_sequence_fails_alone(fake, runner):
    runner.errors[1] = "not a number"
    (good,), (bad,) = fake.generate(["one", "two"], GREEDY, use_tqdm=False)
    assert good.finish_reason == "length"
    assert (bad.finish_reason, bad.error, bad.text) == ("error", "not a number", "")


def test_a_stream_gives_pieces_and_then_the_whole(fake):
    ((whole,),) = fake.generate("hello", GREEDY, use_tqdm=False)
    pieces, end = [], None
    stream = fake.stream("hello", GREEDY)
    while end is None:
        try:
            pieces.append(next(stream).text)
        except StopIteration as stop:
            end = stop.value
    assert len(pieces) == 12
    assert "".join(pieces) == whole.text == end.text
    assert end.tokens == whole.tokens


def test_a_closed_stream_leaves_the_engine_clean(fake):
    with closing(fake.stream("hello", GREEDY)) as stream:
        next(stream)
        with pytest.raises(RuntimeError, match="another generation"):
            fake.generate("x", GREEDY, use_tqdm=False)
    assert not fake.engine.has_work
    assert fake.generate("hello", GREEDY, use_tqdm=False)


@pytest.mark.parametrize("moment", ["waiting", "between"])
def test_an_interruption_leaves_the_engine_clean(fake, runner, monkeypatch, moment):
    """Ctrl-C while a step runs, or while its news are taken in."""
    expected = fake.generate(PROMPTS, GREEDY, use_tqdm=False)
    collect, calls = fake.engine.collect, []

    def interrupted(pending):
        calls.append(pending)
        if len(calls) == 3 and moment == "waiting":
            raise KeyboardInterrupt
        return collect(pending)

    def interrupted_push(*args):
        if calls:
            raise KeyboardInterrupt
        return push(*args)

    push = Detokenizer.push
    monkeypatch.setattr(fake.engine, "collect", interrupted)
    if moment == "between":
        monkeypatch.setattr(Detokenizer, "push", interrupted_push)
    with pytest.raises(KeyboardInterrupt):
        fake.generate(PROMPTS, GREEDY, use_tqdm=False)
    monkeypatch.undo()
    assert not fake.engine.has_work
    again = fake.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [one.tokens for (one,) in again] == [one.tokens for (one,) in expected]


def test_a_failed_step_fails_its_requests_and_no_later_ones(fake, runner):
    expected = fake.generate(PROMPTS, GREEDY, use_tqdm=False)
    runner.failing = {len(runner.plans) + 2: "run"}
    with capture_logs() as logs:
        failed = fake.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [(line["event"], type(line["exc_info"])) for line in logs] == [
        ("step_failed", ArithmeticError)
    ]
    assert {one.finish_reason for (one,) in failed} == {"error", "length"}
    assert {one.error for (one,) in failed if one.finish_reason == "error"} == {
        "The step that computed it failed (ArithmeticError)."
    }
    again = fake.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [one.tokens for (one,) in again] == [one.tokens for (one,) in expected]


def test_a_lost_engine_says_so_at_once(make_engine):
    runner = FakeRunner(16)
    loaded = SimpleNamespace(
        engine=make_engine(runner), tokenizer=ByteTokenizer(), chat=Chat(), close=lambda: None
    )
    llm = LLM.over(loaded)
    runner.broken, runner.lost = ArithmeticError("broken"), True
    for _ in range(2):
        with pytest.raises(EngineDeadError) as caught:
            llm.generate("x", GREEDY, use_tqdm=False)
        assert caught.value.__cause__ is runner.broken


@pytest.mark.parametrize("use", ["generate", "chat", "stream"])
def test_used_after_closing_it_says_so_at_once(fake, runner, use):
    argument = [{"role": "user", "content": "hi"}] if use == "chat" else "hi"
    getattr(fake, use)(argument, GREEDY)
    runner.plans.clear()
    fake.close()
    fake.close()  # twice is once
    with pytest.raises(RuntimeError, match="closed"):
        getattr(fake, use)(argument, GREEDY)
    assert runner.plans == []


def test_a_stream_ends_when_its_llm_is_closed(fake):
    stream = fake.stream("hello", GREEDY)
    next(stream)
    fake.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(stream)


def test_a_stream_refuses_when_it_is_asked_for(fake):
    with pytest.raises(ContextLengthError):
        fake.stream("x" * 300, GREEDY)


def test_progress_goes_to_stderr(fake, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fake.generate(PROMPTS, GREEDY)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "4/4" in shown.err
    fake.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- the default model


@pytest.fixture(scope="module")
def llm():
    with LLM(max_model_len=512, max_num_seqs=8, kv_cache_memory="128MiB", threads=2) as llm:
        yield llm


def test_a_stop_string_waits_for_min_tokens(llm):
    count, text = "1, 2, 3, 4,", TextOptions(stop=(",",))
    ((early,),) = llm.generate(count, GREEDY, text, use_tqdm=False)
    patient = replace(GREEDY, min_tokens=10, max_tokens=24)
    ((late,),) = llm.generate(count, patient, text, use_tqdm=False)
    assert early.stop_reason == late.stop_reason == ","
    assert len(early.tokens) < 10 < len(late.tokens)
    assert late.text.startswith(early.text)


def test_the_default_model_draws_as_its_authors_say(llm):
    assert llm.default_sampling() == SamplingParams(temperature=0.2, top_p=0.9)
    assert llm.default_sampling(temperature=1.5).top_p == 0.9


SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=1234, max_tokens=8, logprobs=1)
QUESTIONS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at",
    "The three primary colors are red,",
]


def test_the_default_model_knows_its_capital(llm):
    ((one,),) = llm.generate(QUESTIONS[0], GREEDY, use_tqdm=False)
    assert one.text.startswith(" Paris")
    assert one.num_prompt == 5


def test_the_default_model_answers_a_chat_and_ends(llm):
    ask = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    sampling = SamplingParams(temperature=0, max_tokens=60)
    ((one,),) = llm.chat(ask, sampling, use_tqdm=False)
    assert "Paris" in one.text
    assert one.finish_reason == "stop"
    assert "<|" not in one.text


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_request_gives_the_same_tokens_alone_and_among_others(llm, sampling):
    """Also to the last bit of its logprobs. Not luck: the CPU kernels reduce every row in an order
    that depends on the model alone, and the sampler computes each row by itself."""
    together = llm.generate(QUESTIONS, sampling, use_tqdm=False)
    for question, (one,) in zip(QUESTIONS, together, strict=True):
        ((alone,),) = llm.generate(question, sampling, use_tqdm=False)
        assert alone.tokens == one.tokens
        assert alone.logprobs == one.logprobs


def test_a_seed_decides_and_completions_differ(llm):
    first = llm.generate(QUESTIONS[2], SEEDED, n=3, use_tqdm=False)
    assert first == llm.generate(QUESTIONS[2], SEEDED, n=3, use_tqdm=False)
    assert len({one.tokens for one in first[0]}) == 3
    unseeded = SamplingParams(max_tokens=10)
    drawn = {llm.generate(QUESTIONS[2], unseeded, use_tqdm=False)[0][0].tokens for _ in range(2)}
    assert len(drawn) == 2


def test_prompt_logprobs_are_those_of_one_forward(llm):
    """The same numbers whether scored as a prompt, or drawn token by token."""
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=2)
    ids = llm.tokenizer.encode(QUESTIONS[0])
    ((drawn,),) = llm.generate(ids, sampling, use_tqdm=False)
    scoring = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    ((scored,),) = llm.generate(ids + list(drawn.tokens), scoring, use_tqdm=False)
    found = scored.prompt_logprobs[len(ids) :]
    assert [entry.token for entry in found] == list(drawn.tokens)
    for entry, expected in zip(found, drawn.logprobs, strict=True):
        assert entry.logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert entry.rank == expected.rank == 1


def test_what_was_planned_is_what_there_is(llm):
    memory = llm.loaded.memory
    assert memory.cache_bytes <= 128 << 20
    assert memory.max_model_len == llm.engine.max_model_len == 512
    assert memory.num_blocks == llm.engine.stats.num_blocks
    assert llm.loaded.threads == 2


def test_an_empty_stop_string_is_refused(llm):
    with pytest.raises(RequestError, match="stop"):
        llm.generate("short", GREEDY, TextOptions(stop=("",)), use_tqdm=False)
    assert not llm.engine.has_work


def test_settings_that_cannot_be_honoured_are_refused():
    with pytest.raises(ConfigError, match="--max-model-len"):
        LLM(max_model_len=100_000)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--device cuda"):
            LLM(device="cuda")
        with pytest.raises(ConfigError, match="--kernels triton"):
            LLM(kernels="triton")
    with pytest.raises(TypeError, match="no_such_setting"):
        LLM(no_such_setting=1)


def test_an_event_loop_may_run_around_it(llm):
    async def main():
        return llm.generate(QUESTIONS[0], GREEDY, use_tqdm=False)

    ((one,),) = asyncio.run(main())
    assert one.text.startswith(" Paris")


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["°C", "°F"]},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "custom", "custom": {"name": "note", "description": "Writes a note"}},
]
HOW_WARM = [{"role": "user", "content": "How warm is it in Rome?"}]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_the_default_model_has_to_call(llm, choice):
    """Its template knows no tools, and it would not call them by itself."""
    sampling = SamplingParams(temperature=0.9, seed=5, max_tokens=70)
    (answers,) = llm.chat(
        HOW_WARM, sampling, tools=TOOLS[:1], tool_choice=choice, n=3, use_tqdm=False
    )
    num_whole = 0
    for answer in answers:
        assert answer.text == ""
        assert len(answer.tool_calls) == 1 or choice == "required"
        cut = answer.finish_reason == "length"  # in its last call
        for call in answer.tool_calls[: -1 if cut else None]:
            assert call.name == "weather"
            jsonschema.validate(json.loads(call.arguments), WEATHER)
            num_whole += 1
    assert num_whole >= len(answers)


def test_the_default_model_streams_its_calls(llm):
    sampling = SamplingParams(temperature=0, max_tokens=80)
    options = {"tools": TOOLS[:1], "tool_choice": "required"}
    with closing(llm.stream_chat(HOW_WARM, sampling, **options)) as stream:
        deltas = list(stream)
    first, *others = [delta.tool_call for delta in deltas if delta.tool_call is not None]
    pieces = [piece for piece in others if piece.index == 0]
    assert (first.index, first.name, first.arguments) == (0, "weather", "")
    assert all(piece.id is None for piece in pieces)
    assert len(pieces) > 3
    jsonschema.validate(json.loads("".join(piece.arguments for piece in pieces)), WEATHER)
    ((whole,),) = llm.chat(HOW_WARM, sampling, use_tqdm=False, **options)
    assert whole.tokens == tuple(token for delta in deltas for token in delta.tokens)


def test_the_default_model_writes_to_a_custom_tool_that_is_forced(llm):
    sampling = SamplingParams(temperature=0, max_tokens=24)
    named = {"type": "custom", "custom": {"name": "note"}}
    ((one,),) = llm.chat(HOW_WARM, sampling, tools=TOOLS, tool_choice=named, use_tqdm=False)
    (call,) = one.tool_calls
    assert (call.name, call.custom) == ("note", True)
    assert call.arguments in llm.tokenizer.decode(one.tokens)
    assert len(call.arguments) > 10
