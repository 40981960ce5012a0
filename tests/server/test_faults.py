"""Faults provoked in a server process: what they hit fails, the rest goes on, or all is told."""

from __future__ import annotations

import json
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from embedded import running
from ports import free_port

import ruvon

PROGRAM = (str(Path(__file__).parent / "faulty.py"),)
FEW_FILES = 96


def ask(url, prompt="fine"):
    """A completion's status and body."""
    body = json.dumps({"prompt": prompt, "add_special_tokens": False}).encode()
    try:
        with urlopen(Request(f"{url}/v1/completions", body), timeout=30) as reply:
            return reply.status, json.loads(reply.read())
    except HTTPError as error:
        return error.code, json.loads(error.read())


def ask_until_answered(process, url):
    """Asks again as long as the server lives and there is nobody to connect to."""
    while process.poll() is None:
        with suppress(URLError, OSError):
            return ask(url)[0]
        time.sleep(0.05)
    raise AssertionError(f"the server ended with {process.returncode}")


@contextmanager
def server(*flags, **options) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server process and its address, where its log cannot be read."""
    port = free_port()
    command = [sys.executable, *PROGRAM, "--port", str(port), *flags]
    with subprocess.Popen(command, **options) as process:
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def test_a_server_that_much_happens_to_goes_on():
    """One after the other: its disk is full, steps fail, it is stopped for a while, and it has no
    file descriptor left."""
    with (
        Path("/dev/full").open("w") as full,
        server("--watchdog-timeout", "1", stderr=full) as (process, url),
    ):
        assert ask_until_answered(process, url) in (200, 503)
        while ask(url)[0] == 503:  # still loading
            time.sleep(0.05)
        for prompt, kind in (
            ("torch's memory", "RuntimeError"),
            ("memory", "MemoryError"),
            ("operator", "RuntimeError"),
        ):
            status, body = ask(url, prompt)
            assert (status, body["error"]["code"]) == (500, "generation_failed")
            assert kind in body["error"]["message"]
            assert ask(url)[0] == 200
        stay_stopped(process, url)
        use_up_files(process, url)
        assert lines_dropped(url) > 10
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def stay_stopped(process, url):
    """For longer than a watchdog is patient: its clocks jump, and nothing was stuck."""
    process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, url)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        assert asked.result()[0] == 200


def use_up_files(process, url):
    host, port = url.removeprefix("http://").split(":")
    files = Path(f"/proc/{process.pid}/fd")
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (FEW_FILES, FEW_FILES))
    with ExitStack() as stack:
        while len(list(files.iterdir())) < FEW_FILES - 2:
            stack.enter_context(socket.create_connection((host, int(port))))
        for _ in range(FEW_FILES):  # these find none
            stack.enter_context(socket.create_connection((host, int(port))))
    assert [ask_until_answered(process, url) for _ in range(40)] == [
        200
    ] * 40  # all listeners are there


def lines_dropped(url):
    with urlopen(f"{url}/metrics") as page:
        found = re.search(
            r"^ruvon_log_lines_dropped_total (\S+)", page.read().decode(), re.MULTILINE
        )
    return float(found[1])


def test_a_hang_is_reported_with_stacks_and_ends_the_process():
    with running("--watchdog-timeout", "1", program=PROGRAM) as process:
        url = process.wait_for("listening")["url"]
        process.wait_for("ready")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, url, "hang")
            entry = process.wait_for("stuck")
            assert (entry["running"], len(entry["sequences"])) == (1, 1)
            assert "Thread MainThread" in entry["stack"]
            assert process.popen.wait(20) == 70
            assert asked.result()[1]["error"]["code"] == "engine_dead"


def test_even_what_holds_the_interpreters_lock_is_ended():
    with running("--watchdog-timeout", "1", program=PROGRAM) as process:
        url = process.wait_for("listening")["url"]
        process.wait_for("ready")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(ask, url, "lock")
            rest = process.rest()
        assert process.popen.returncode == 1
        assert "FAULTS" in rest or "faulty.py" in rest  # faulthandler's stacks
        assert isinstance(asked.exception(), URLError | OSError)


DATES = re.compile(r"int\(time\.time\(\)\)|st_mtime")


def test_no_time_is_measured_on_a_clock_that_can_be_set():
    """Dates are told by one, and the age of a file."""
    root = Path(ruvon.__file__).parent
    found = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in root.rglob("*.py")
        if "doctor" not in path.parts  # asks for dates
        for line in path.read_text().splitlines()
        if "time.time()" in line and not DATES.search(line)
    ]
    assert found == []
