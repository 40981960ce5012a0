"""The command line: options, errors, and the commands that talk to a server."""

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner
from embedded import MODEL, needs_model
from rich.console import Console

from ruvon.cli import main
from ruvon.cli.answers import Remote, Usage
from ruvon.cli.bench import address
from ruvon.cli.chat import Conversation, Printer, obey, read_message, run
from ruvon.cli.client import Client
from ruvon.config import EngineConfig, ServerConfig, kinds, variable
from ruvon.deltas import Delta
from ruvon.errors import PeerError
from ruvon.server.imports import importing


def chunk(text="", **fields):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **fields}


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}


class FakeServer(ThreadingHTTPServer):
    """Answers every POST with the events it is given, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.events = [chunk("Hel"), chunk("lo"), USAGE, "[DONE]"]
        self.status = 200
        self.refusal = '{"error": {"message": "too long"}}'
        self.asked = []


class FakeHandler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        card = {"id": "fake", "max_model_len": 2048, "default_sampling": {"temperature": 0.3}}
        self.reply(200, json.dumps({"data": [card]}).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, json.loads(body)))
        if self.server.status != 200:
            return self.reply(self.server.status, self.server.refusal.encode())
        lines = [e if isinstance(e, str) else json.dumps(e) for e in self.server.events]
        stream = "".join(f": comment\n\ndata: {line}\n\n" for line in lines)
        return self.reply(200, stream.encode(), "text/event-stream")


@pytest.fixture
def server():
    with FakeServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def invoke(*args, **rest):
    return CliRunner().invoke(main, args, **rest)


HEAVY = {
    "aiohttp", "asyncio", "huggingface_hub", "jinja2", "numba", "numpy", "pydantic", "rich",
    "structlog", "tokenizers", "torch", "transformers",
}  # fmt: skip
RUN = """
import sys
from ruvon.cli import main
try:
    main(sys.argv[1:], prog_name="ruvon")
finally:
    print("loaded:", *sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "serve"),
        (["--version"], "ruvon"),
        (["serve", "--help"], "--max-num-seqs"),
        (["bench", "serve", "--help"], "--num-prompts"),
        (["serve", "--max-num-seqs", "9", "--max-num-batched-tokens", "8"], "max_num_seqs 9"),
        (["serve", "--config", "no/such.toml"], "no/such.toml"),
        (["serve", "./nowhere"], "nowhere: no such file"),
        (["complete", "Hello", "--model", "nowhere.gguf"], "nowhere.gguf: no such file"),
    ],
)
def test_words_about_the_command_line_do_not_wait_for_heavy_imports(arguments, said):
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    told, _, loaded = (done.stderr + done.stdout).partition("loaded:")
    assert said in told
    assert "click" in loaded.split()
    assert not HEAVY.intersection(loaded.split())


@pytest.mark.parametrize("group", [[], ["bench"]])
def test_no_summary_of_a_command_is_cut(group):
    commands = invoke(*group, "--help").output.partition("Commands:")[2]
    assert commands
    assert "..." not in commands


STREAMS = """
import sys
from ruvon.cli.process import open_closed_streams
open_closed_streams()
assert sys.stdin.read() == ""
print("lost")
print("lost", file=sys.stderr)
assert [one.fileno() for one in (sys.stdin, sys.stdout, sys.stderr)] == [0, 1, 2]
"""


def test_closed_streams_are_the_null_device():
    shut = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", STREAMS]
    assert subprocess.run(shut).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--list"]])
def test_a_full_disk_is_told_in_a_line(arguments):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ruvon", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: [Errno 28] No space left on device\n"


def test_an_interrupt_ends_imports_at_once():
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler
    with importing():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_is_ignored_stays_so_during_imports():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with importing():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000", "localhost:8000", "ftp://a", "http://", "http://[::1",
        "http://a:89111", "http://a:b", "http://a:0", "http://a?b=c", "http://a#b",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "command",
    [
        ["models", "--url"], ["complete", "Hello", "--url"], ["chat", "--url"],
        ["bench", "serve", "--url"], ["record"], ["doctor"],
    ],
)  # fmt: skip
def test_what_is_no_url_of_a_server_is_told_so(command, url):
    result = invoke(*command, url)
    assert result.exit_code == 2
    assert f"{url!r} is not a URL like http://127.0.0.1:8000" in result.output


@pytest.mark.parametrize(
    ("url", "host", "port", "meant"),
    [
        (None, None, None, "http://127.0.0.1:8000"),
        (None, "::1", 9, "http://[::1]:9"),
        ("http://a/v1/", None, None, "http://a"),
    ],
)
def test_the_address_to_bench(url, host, port, meant):
    assert address(url, host, port) == meant


@pytest.mark.parametrize("cls", [EngineConfig, ServerConfig])
def test_every_setting_is_an_option_of_serve(cls):
    text = invoke("serve", "--help").output
    for name, kind in kinds(cls).items():
        shown = "--" + name.replace("_", "-")
        assert shown in text
        assert kind.base is not bool or "--no-" + name.replace("_", "-") in text


def served(monkeypatch, *args, **rest):
    """The configs that ``ruvon serve`` comes to, without serving."""
    calls = []
    monkeypatch.setattr("ruvon.server.app.serve", lambda *configs: calls.append(configs))
    result = invoke("serve", *args, **rest)
    assert result.exit_code == 0, result.output
    return calls[0]


def test_serve_builds_its_configs(monkeypatch, tmp_path):
    path = tmp_path / "ruvon.toml"
    path.write_text('port = 1\nhost = "::1"\nmax_num_seqs = 7\n')
    args = ["some/model", "--port", "9", "--no-enable-prefix-caching", "--config", str(path)]
    engine, server = served(monkeypatch, *args, env={"RUVON_MAX_NUM_SEQS": "8"})
    assert engine.model == "some/model"
    assert engine.max_num_seqs == 8
    assert engine.enable_prefix_caching is False
    assert (server.host, server.port) == ("::1", 9)
    assert server.api_key == ()


def test_serve_takes_keys_and_origins_repeated(monkeypatch):
    keys = ["--api-key", "a", "--api-key", "b"]
    _, server = served(monkeypatch, *keys, env={"RUVON_CORS_ALLOW_ORIGIN": "http://a,http://b"})
    assert server.api_key == ("a", "b")
    assert server.cors_allow_origin == ("http://a", "http://b")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["serve", "--port", "x"], "--port"),
        (["serve", "--batching", "none"], "sequential"),
        (["serve", "--max-num-sesq", "3"], "--max-num-seqs"),
        (["bench", "serve", "--metric-percentiles", "50;99"], "list of numbers"),
        (["bench", "serve", "--metric-percentiles", "101"], "between 0 and 100"),
        (["bench", "serve", "--request-rate", "0"], "is not in the range x>0"),
        (["bench", "serve", "--request-rate", "nan"], "'nan' is not a number"),
        (["bench", "serve", "--random-range-ratio", "nan"], "'nan' is not a number"),
        (["doctor", "http://127.0.0.1:9", "--timeout", "0"], "is not in the range x>0"),
        (["doctor", "http://127.0.0.1:9", "--timeout", "nan"], "'nan' is not a number"),
        (["record", "http://127.0.0.1:9", "--seconds", "nan"], "'nan' is not a number"),
        (["bench", "serve", "--goodput", "itl:5"], "is not like ttft:200"),
        (["bench", "serve", "--goodput", "ttft:fast"], "is not like ttft:200"),
        (["serve", "a", "--model", "b"], "not both"),
        (["serve", "--api-key", ""], "api_key must be printable"),
        (["serve", "--max-num-seqs", "0"], "max_num_seqs must be at least 1"),
        (["serve", "--config", "nowhere.toml"], "nowhere.toml"),
        (["chat", "--url", "http://127.0.0.1:9", "--threads", "2"], "--threads has no effect"),
        (["models", "--url", "127.0.0.1:9"], "not a URL"),
        (["models", "--url", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
        (["bench", "serve", "--percentile-metrics", "ttft,x"], "'x' is not one of ttft"),
        (["bench", "serve", "--save-result", "--result-dir", __file__], "File exists"),
        (["bench", "offline", "--output-json", "nowhere/x.json"], "nowhere is no folder"),
        (["doctor", "http://127.0.0.1:9", "--json", "nowhere/x.json"], "nowhere is no folder"),
        (["doctor", "http://127.0.0.1:9", "--json", "/"], "is a directory"),
        (["replay", "nowhere"], "'nowhere' does not exist"),
        (["replay", "/"], "is a directory"),
    ],
)
def test_mistakes_are_one_line_and_a_failure(args, told):
    result = invoke(*args)
    assert result.exit_code in (1, 2)
    assert told in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["chat", "complete"])
def test_what_was_typed_in_another_encoding_is_told_so(server, command):
    asked = ["complete", b"caf\xe9"] if command == "complete" else ["chat"]
    done = subprocess.run(
        [sys.executable, "-m", "ruvon", *asked, "--url", server.url, "--model", "m"],
        env=os.environ | {"PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8:strict"},
        input=b"caf\xe9\nHi\n" if command == "chat" else b"",
        capture_output=True,
    )
    said = (done.stdout + done.stderr).decode()
    assert "the text is not valid Unicode: it has a lone surrogate" in said
    assert "Traceback" not in said
    contents = [
        body["messages"][-1]["content"] for path, body in server.asked if path.endswith("ns")
    ]
    assert contents == (["Hi"] if command == "chat" else [])


def test_a_bad_variable_is_named():
    result = invoke("serve", env={variable("port"): "x"})
    assert result.exit_code == 1
    assert "RUVON_PORT must be an integer" in result.output


def test_complete_streams_from_a_server(server):
    server.events = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "é"}]}, "[DONE]"]
    args = ["complete", "Once", "--url", server.url + "/v1", "--max-tokens", "3", "--stop", "x"]
    result = invoke(*args, env={"OPENAI_API_KEY": "key"})
    assert (result.exit_code, result.output) == (0, "aé\n")
    (_, headers), (path, payload) = server.asked
    assert headers["Authorization"] == "Bearer key"
    assert path == "/v1/completions"
    assert payload["model"] == "fake"
    assert payload["prompt"] == "Once"
    assert (payload["max_tokens"], payload["stop"]) == (3, ["x"])
    assert "temperature" not in payload


@needs_model
def test_models_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    name, *rest = invoke("models").output.splitlines()[1].split()
    assert (name, rest) == (MODEL, ["embedded", "default", "98", "MB"])


def test_no_models_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr("ruvon.cli.models.embedded_name", lambda: None)
    assert "No model on this machine: make setup" in invoke("models").output


def test_an_error_in_an_answer_has_a_line_of_its_own(server):
    server.events = [chunk("Hel")]
    result = invoke("complete", "Hi", "--url", server.url, "--model", "m")
    assert result.output.startswith("Hel\nError: ")
    server.events = []
    result = invoke("complete", "Hi", "--url", server.url, "--model", "m")
    assert result.output.startswith("Error: ")


def test_complete_reads_stdin(server):
    server.events = ["[DONE]"]
    args = ["complete", "-", "--url", server.url, "--model", "m"]
    assert invoke(*args, input="from a pipe").exit_code == 0
    assert server.asked[0][1]["prompt"] == "from a pipe"


def test_stdin_that_is_no_text_is_told_so():
    result = CliRunner().invoke(main, ["complete", "-"], input=b"caf\xe9")
    assert result.exit_code == 2
    assert "stdin is not UTF-8: unexpected end of data at 3" in result.output


def test_models_of_a_server(server):
    output = invoke("models", "--url", server.url, env={"RUVON_API_KEY": "mine, yours"}).output
    assert server.asked[0][1]["Authorization"] == "Bearer mine"  # the servers' variable has several
    assert "fake" in output
    assert "2,048" in output


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([chunk("a"), {"error": {"message": "the engine is dead"}}, "[DONE]"], "engine is dead"),
        ([chunk("a")], "before it was done"),
        (["{"], "http://127.0.0.1"),
    ],
)
def test_a_stream_that_fails_raises(server, events, told):
    server.events = events
    with pytest.raises(PeerError, match=told):
        list(Remote(Client(server.url), "m").chat([], {}))


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('{"error": {"message": "too long"}}', "400 Bad Request: too long"),
        ('{"error": "busy"}', "400 Bad Request: busy"),
        ('{"detail": "no such path"}', "400 Bad Request: no such path"),
        ('["?"]', r'400 Bad Request: \["\?"\]'),
        ("<html>nginx</html>", "400 Bad Request: <html>nginx"),
    ],
)
def test_errors_of_other_servers_are_shown_in_their_words(server, body, told):
    server.status, server.refusal = 400, body
    with pytest.raises(PeerError, match=told):
        list(Remote(Client(server.url), "m").chat([], {}))


class Scripted:
    """A source with answers written down; None interrupts as Ctrl-C does."""

    name = "scripted"
    defaults = {"temperature": 0.2, "top_p": 0.9}  # noqa: RUF012

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.closed = 0

    def chat(self, messages, options):
        self.asked.append((list(messages), dict(options)))
        try:
            for text in self.answers.pop(0):
                if text is None:
                    raise KeyboardInterrupt
                yield Delta(text=text)
            return Usage(num_prompt=3, num_output=2)
        finally:
            self.closed += 1


def test_reasoning_is_set_apart_from_the_answer(capsys):
    printer = Printer(Console(width=200))
    for delta in (
        Delta(reasoning="Hm"),
        Delta(reasoning=" [b]"),
        Delta(text="Yes"),
        Delta(text="."),
    ):
        printer.show(delta)
    assert capsys.readouterr().out == "Hm [b]\n\nYes."


def talk(monkeypatch, source, *lines):
    """Run a conversation with these lines typed; returns it and what was shown."""
    typed = iter(lines)

    def read(prompt):
        line = next(typed, None)
        if line is None:
            raise EOFError
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    conversation = Conversation(source)
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        run(conversation, console)
    return conversation, console.export_text()


def test_a_chat_remembers_and_streams(monkeypatch):
    source = Scripted(["Hel", "lo"], ["Bye [b]"])
    conversation, shown = talk(monkeypatch, source, "Hi", "", "Ciao")
    assert "Hello" in shown
    assert "scripted  temperature 0.2; top_p 0.9; /help" in shown
    assert "Bye [b]" in shown
    assert [turn["content"] for turn in conversation.turns] == ["Hi", "Hello", "Ciao", "Bye [b]"]
    assert source.asked[1][0][:2] == conversation.turns[:2]
    assert (conversation.stats.num_prompt, conversation.stats.num_output) == (3, 2)


def test_an_interrupted_answer_is_kept_and_the_program_goes_on(monkeypatch):
    source = Scripted(["Half", None, "never"], [None], ["fine"])
    conversation, shown = talk(monkeypatch, source, "1", "2", KeyboardInterrupt, "3")
    assert shown.count("(stopped)") == 2
    assert "never" not in shown
    assert [turn["content"] for turn in conversation.turns] == ["1", "Half", "3", "fine"]
    assert source.closed == 3


def test_commands(monkeypatch, tmp_path):
    source = Scripted(["a"], ["b"])
    path = tmp_path / "chat.json"
    conversation, shown = talk(
        monkeypatch,
        source,
        *("/stats", "/system Be brief.", "/set temperature 0.5", "/set top_k x", "/set nothing 1"),
        *("one", "/stats", f"/save {path}", "/set temperature default", "/reset", "two", "/what"),
        *("/help", "/set", "/system", "/save", "/exit", "never read"),
    )
    assert source.asked[0] == (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}],
        {"temperature": 0.5},
    )
    assert source.asked[1][1] == {}
    assert len(source.asked[1][0]) == 2
    assert json.loads(path.read_text())["messages"][-1] == {"role": "assistant", "content": "a"}
    for told in ("no answer yet", "is not a number", "cannot be set", "/what is not", "/set [NAME"):
        assert told in shown
    assert conversation.system == "Be brief."


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""', "def f():", "    pass", '"""'], "def f():\n    pass"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""one"""'], "one"),
    ],
)
def test_messages_of_several_lines(monkeypatch, typed, message):
    lines = iter(typed)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert read_message() == message


def test_exit_leaves():
    assert obey("/quit", Conversation(Scripted()), Console()) is False


def test_bench_serve_prints_and_saves(server, tmp_path):
    server.events = [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, USAGE, "[DONE]"]
    args = ["--base-url", server.url, "--num-prompts", "3", "--max-concurrency", "2"]
    saving = ["--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
    result = invoke("bench", "serve", *args, *saving, "--metric-percentiles", "50,99.9")
    assert result.exit_code == 0, result.output
    assert "Successful requests:                     3" in result.output
    assert "P99.9 TTFT (ms):" in result.output
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["model_id"] == "fake"
    assert saved["output_lens"] == [2, 2, 2]
    assert {"mean_ttft_ms", "p99.9_itl_ms", "request_throughput", "itls"} <= set(saved)


def test_bench_serve_asks_one_server():
    result = invoke("bench", "serve", "--url", "http://a", "--port", "9")
    assert result.exit_code == 2
    assert "two servers" in result.output


def test_bench_serve_says_when_requests_fail(server):
    server.status = 400
    result = invoke("bench", "serve", "--url", f"{server.url}/v1")
    assert result.exit_code == 1
    assert "too long" in result.output
