"""Servers as child processes: what their workers use counts as theirs."""

import importlib
import signal
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
BALLAST = 64 << 20  # bytes
CPU_SECONDS = 0.5

WORKER = f"""
import time
ballast = b"x" * {BALLAST}
while time.process_time() < {CPU_SECONDS}:
    pass
print("worked", flush=True)
time.sleep(600)
"""

SERVER = f"""
import http.server, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", '''{WORKER}'''], stdout=subprocess.PIPE)
worker.stdout.readline()
address = ("127.0.0.1", int(sys.argv[1]))
http.server.HTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()
"""
"""Ready when its worker has worked; ends without waiting for it."""


@pytest.fixture
def process(monkeypatch):
    """The module; `running` leaves a signal's handler behind."""
    monkeypatch.syspath_prepend(BENCH)
    before = signal.getsignal(signal.SIGTERM)
    yield importlib.import_module("process")
    signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_s_workers_are_its_own(process):
    before, port = process.own_ticks(), process.free_port()
    with process.running([sys.executable, "-c", SERVER, str(port)], port, "/") as server:
        members = process.family(server.pid)
        assert (len(members), members[0]) == (2, server.pid)
        assert server.ready_memory > BALLAST
    assert process.own_ticks() - before > 0.9 * CPU_SECONDS * process.TICKS
    assert not {*members} & {*process.parents()}  # none is left, not even as a zombie


def test_what_is_timed_of_a_step_exists(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    parts = importlib.import_module("parts").PARTS
    assert [
        name for name, (owner, attribute) in parts.items() if not hasattr(owner, attribute)
    ] == []
