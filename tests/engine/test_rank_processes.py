"""Ranks that are processes: a server of them, and what is left when one of them or it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from embedded import running
from fakes import TINY_LLAMA, emissions_of

from ruvon.config import EngineConfig
from ruvon.engine.ranks.nodes import connect, prove
from ruvon.engine.startup import start_engine
from ruvon.engine.types import Job, SamplingParams
from ruvon.grammars import regex
from ruvon.telemetry import silent

SETTINGS = {"load_format": "dummy", "device": "cpu", "kernels": "torch", "kv_cache_memory": "1MiB"}
ON_CARDS = {"device": "cuda", "kernels": "triton"}
WHERE = [
    pytest.param({}, id="cpu"),
    pytest.param(
        ON_CARDS,
        id="cards",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
        ],
    ),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    return tmp_path


def answers(loaded) -> dict[int, list[int]]:
    """Tokens of a few jobs, of different lengths and settings, that run beside each other."""
    engine = loaded.engine
    for i, grammar in enumerate((None, regex("[a-f]{9}x+"), None)):
        sampling = SamplingParams(
            temperature=float(i == 2), seed=5, max_tokens=12, logprobs=2, grammar=grammar
        )
        job = engine.prepare(Job(tuple(range(3, 10 + 20 * i)), sampling))
        engine.add(job, 0.0)
    tokens: dict[int, list[int]] = {}
    for emission in emissions_of(engine):
        assert emission.error is None
        tokens.setdefault(emission.seq_id, []).extend(emission.tokens)
    return tokens


def gone(pid: int) -> bool:
    """Whether a process is no more, but for what its parent has not asked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(true, *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_processes_give_the_tokens_of_one(folder, axis):
    config = EngineConfig(model=str(folder), threads=2, **SETTINGS)
    alone = start_engine(config, silent)
    expected = answers(alone)
    alone.close()
    shown: list[tuple[str, float]] = []
    loaded = start_engine(
        replace(config, **{axis: 2}), lambda phase, share: shown.append((phase, share))
    )
    pids = loaded.runner.pids
    assert answers(loaded) == expected
    assert {phase for phase, _ in shown} >= {"opening model", "loading weights", "warming up"}
    assert loaded.ranks == 2
    os.kill(pids[1], signal.SIGKILL)  # while nothing runs
    assert str(loaded.failed.exception(30)) == "rank 1 was killed by SIGKILL"
    loaded.close()
    assert all(map(gone, pids))


def ranks_of(server: int) -> list[int]:
    """The pids of a server's ranks, in order."""
    children = [
        int(pid)
        for task in Path(f"/proc/{server}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    program = b"ruvon.engine.ranks.rank"
    return sorted(pid for pid in children if program in Path(f"/proc/{pid}/cmdline").read_bytes())


def serve(folder: Path, *more: str, axis: str = "tensor", **other: str):
    """A server of two ranks; ``other`` settings than those above."""
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in (SETTINGS | other).items()]
    settings += [f"--{axis}-parallel-size=2", "--watchdog-timeout=0"]  # it shall live on
    return running("--model", str(folder), *settings, *more)


def ask(url: str, **body: object):
    data = json.dumps({"model": "m", "prompt": "abc", **body}).encode() if body else None
    headers = {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60)


def texts(url: str, **body: object) -> list[str]:
    """The pieces of a streamed completion."""
    with ask(f"{url}/v1/completions", stream=True, **body) as answer:
        lines = [line.removeprefix(b"data: ") for line in answer if line.strip()]
    assert lines[-1] == b"[DONE]\n"
    return [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]


@pytest.mark.slow
@pytest.mark.parametrize("where", WHERE)
def test_ranks_answer_over_http_and_end_with_their_server(folder, where):
    with serve(folder, **where) as process:
        url = process.wait_for("listening")["url"]
        assert "2 ranks" in process.wait_for("ready")["computes_in"]
        ranks = ranks_of(process.popen.pid)
        body = {"model": folder.name, "max_tokens": 40, "ignore_eos": True, "temperature": 0}
        with ask(f"{url}/v1/completions", **body) as answer:
            whole = json.load(answer)["choices"][0]["text"]
        pieces = texts(url, **body)
        assert len(pieces) > 1
        assert "".join(pieces) == whole
        process.popen.terminate()
        assert process.popen.wait(60) == 0
        assert len(ranks) == 2
        assert all(map(gone, ranks))


@pytest.mark.slow
@pytest.mark.parametrize("where", WHERE)
def test_a_rank_that_is_killed_under_load_ends_its_requests_and_live_says_so(folder, where):
    with serve(folder, **where) as process:
        url = process.wait_for("listening")["url"]
        ready = process.wait_for("ready")
        assert "2 ranks" in ready["computes_in"]
        ranks = ranks_of(process.popen.pid)
        for pid in ranks:  # as Ctrl-C reaches them
            os.kill(pid, signal.SIGINT)
        body = {"model": folder.name, "max_tokens": 100, "ignore_eos": True, "stream": True}
        lines: list[bytes] = []
        stopped = threading.Event()

        def read() -> None:
            with ask(f"{url}/v1/completions", **body) as answer:
                for line in answer:
                    lines.append(line)
                    if len(lines) == 5:
                        os.kill(ranks[1], signal.SIGSTOP)  # so that its request does not end first
                        stopped.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert stopped.wait(60)
        os.kill(ranks[1], signal.SIGKILL)
        reader.join(30)
        assert "The engine has failed (RankError)" in b"".join(lines).decode()
        assert "rank 1 was killed by SIGKILL" in str(process.wait_for("engine_dead"))
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(f"{url}/live")
        assert (refused.value.code, json.load(refused.value)) == (503, {"status": "dead"})
        until(lambda: all(map(gone, ranks)))


@pytest.mark.slow
@pytest.mark.parametrize("where", WHERE)
def test_ranks_end_with_a_server_that_is_killed(folder, where):
    with serve(folder, **where) as process:
        process.wait_for("ready")
        ranks = ranks_of(process.popen.pid)
        assert len(ranks) == 2
        os.kill(ranks[0], signal.SIGSTOP)  # whatever it is doing
        process.popen.kill()
        until(lambda: all(map(gone, ranks)))


@pytest.mark.slow
def test_a_server_whose_second_stage_is_on_another_machine(folder):
    """Another address stands for it. Whoever does not know the key is not let in."""
    with socket.create_server(("127.0.0.2", 0)) as listener:
        address = listener.getsockname()
    where = (f"--master-addr={address[0]}", f"--master-port={address[1]}")
    nodes = ("--nnodes=2", *where, "--cluster-key=0123456789abcdef")
    with ExitStack() as stack:
        server = stack.enter_context(serve(folder, *nodes, axis="pipeline"))
        url = server.wait_for("listening")["url"]
        with connect(address) as stranger, pytest.raises(ValueError, match="another --cluster-key"):
            prove(stranger, b"the key of somebody", b"node", b"server")
        assert "another --cluster-key" in str(server.wait_for("node_refused"))
        node = stack.enter_context(serve(folder, *nodes, "--node-rank=1", axis="pipeline"))
        assert "2 ranks" in server.wait_for("ready")["computes_in"]
        ranks = [*ranks_of(server.popen.pid), *ranks_of(node.popen.pid)]
        assert len(ranks) == 2
        body = {"model": folder.name, "max_tokens": 8, "ignore_eos": True}
        with ask(f"{url}/v1/completions", **body) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 8
        os.kill(ranks[1], signal.SIGKILL)
        assert "rank 1 was killed by SIGKILL" in str(server.wait_for("engine_dead"))
        assert node.popen.wait(30) == 1
        until(lambda: all(map(gone, ranks)))
