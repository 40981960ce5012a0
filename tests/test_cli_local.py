"""Answers from the engine in process, over a fake runner."""

from types import SimpleNamespace

from click.testing import CliRunner
from fakes import ByteTokenizer, FakeRunner

from ruvon import LLM, SamplingParams
from ruvon.cli import main
from ruvon.cli.answers import Usage
from ruvon.cli.bench import progress_bar
from ruvon.cli.local import Local, loading_bar
from ruvon.deltas import Delta
from ruvon.models.chat import PlainParser, Turn


class Shouting:
    """A parser that holds its last character back: reasoning in lower case, text in upper."""

    def __init__(self, text):
        self.text = text
        self.held = ""

    def push(self, ids):
        said = self.held + self.text.push(ids)
        self.held = said[-1:]
        return [Delta(reasoning=said[:-1])] if said[:-1] else []

    def finish(self):
        return [Delta(text=(self.held + self.text.finish()).upper())]


class Chat:
    def __init__(self, parser):
        self.parser = parser

    def turn(self, messages, **options):
        prompt = [token for message in messages for token in message["content"].encode()]
        return Turn(tuple(prompt), self.parser)


def make_local(make_engine, parser=PlainParser, defaults=None):
    loaded = SimpleNamespace(
        engine=make_engine(FakeRunner(16)),
        tokenizer=ByteTokenizer(),
        chat=Chat(parser),
        checkpoint=SimpleNamespace(name="fake"),
        defaults=defaults or {},
        close=lambda: None,
    )
    return Local(LLM.over(loaded))


HELLO = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0.0, "max_tokens": 6}


def listen(answer):
    """(Its deltas, its counts)."""
    counts = []

    def over():
        counts.append((yield from answer))

    return list(over()), counts[0]


def test_an_answer_comes_in_deltas_and_ends_with_its_counts(make_engine):
    local = make_local(make_engine)
    deltas, usage = listen(local.chat(HELLO, GREEDY))
    ((whole,),) = local.llm.chat(HELLO, SamplingParams(**GREEDY), use_tqdm=False)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert len(deltas) > 2
    assert deltas[-1].finish == "length"
    assert usage == Usage(num_prompt=5, num_output=6)


def test_bars_stay_off_files(make_engine, capfd):
    with loading_bar() as progress:
        progress("loading weights", 0.5)
    local = make_local(make_engine)
    local.llm.generate(["hello"], SamplingParams(**GREEDY), use_tqdm=True)
    with progress_bar(2, disabled=False) as advance:
        advance(None)
    assert capfd.readouterr() == ("", "")


def test_the_models_parser_sees_all_ids(make_engine):
    local = make_local(make_engine, Shouting)
    deltas = list(local.chat(HELLO, GREEDY))
    plain = list(make_local(make_engine).chat(HELLO, GREEDY))
    text = "".join(delta.text for delta in plain)
    assert "".join(delta.reasoning for delta in deltas) == text[:-1]
    assert "".join(delta.text for delta in deltas) == text[-1].upper()
    ((whole,),) = local.llm.chat(HELLO, SamplingParams(**GREEDY), use_tqdm=False)
    assert (whole.reasoning, whole.text) == (text[:-1], text[-1].upper())


def test_leaving_an_answer_frees_the_engine(make_engine):
    local = make_local(make_engine)
    answer = local.complete("hello", {"max_tokens": 50})
    next(answer)
    answer.close()
    assert not local.llm.engine.has_work
    assert listen(local.complete("hello", {"max_tokens": 1}))[1].num_output == 1


def test_the_models_sampling_defaults_apply_where_none_are_given(make_engine, monkeypatch):
    local = make_local(make_engine, defaults={"top_k": 3, "temperature": 0.7})
    added = []
    add = local.llm.engine.add
    monkeypatch.setattr(
        local.llm.engine, "add", lambda job, *rest: added.append(job) or add(job, *rest)
    )
    list(local.complete("hello", {"max_tokens": 1, "temperature": 0.2}))
    assert (added[0].sampling.top_k, added[0].sampling.temperature) == (3, 0.2)


def test_a_stop_string_ends_a_completion(make_engine):
    local = make_local(make_engine)
    text = "".join(delta.text for delta in local.complete("hello", GREEDY))
    stopped = list(local.complete("hello", {**GREEDY, "stop": [text[2]]}))
    assert "".join(delta.text for delta in stopped) == text[: text.index(text[2])]
    assert stopped[-1].finish == "stop"


def test_complete_in_process(make_engine, monkeypatch):
    configs = []

    def load(config):
        configs.append(config)
        return make_local(make_engine)

    monkeypatch.setattr(Local, "load", load)
    args = ["complete", "hello", "--temperature", "0", "--max-tokens", "6", "--threads", "1"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    text = "".join(delta.text for delta in make_local(make_engine).complete("hello", GREEDY))
    assert result.stdout == text + "\n"
    assert configs[0].threads == 1


def test_bench_offline(make_engine, monkeypatch, tmp_path):
    monkeypatch.setattr("ruvon.llm.LLM", lambda **fields: make_local(make_engine).llm)
    path = tmp_path / "result.json"
    args = ["--num-prompts", "3", "--input-len", "4", "--output-len", "5", "--disable-tqdm"]
    result = CliRunner().invoke(main, ["bench", "offline", *args, "--output-json", str(path)])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Throughput: ")
    assert '"num_requests": 3' in path.read_text()
