"""Faults provoked in a server process: what they hit fails, the rest goes on, or all is told."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from embedded import running

PROGRAM = (str(Path(__file__).parent / "faulty.py"),)


def start(*flags):
    return running(*flags, program=PROGRAM)


def ask(url, prompt="fine", **fields):
    """A completion's status and body."""
    body = json.dumps({"prompt": prompt, "add_special_tokens": False} | fields).encode()
    try:
        with urlopen(Request(f"{url}/v1/completions", body), timeout=30) as reply:
            return reply.status, json.loads(reply.read())
    except HTTPError as error:
        return error.code, json.loads(error.read())


def url_of(process):
    url = process.wait_for("listening")["url"]
    process.wait_for("ready")
    return url


def test_a_step_that_fails_ends_its_requests_and_no_others():
    with start() as process:
        url = url_of(process)
        for prompt, kind in (
            ("out of memory", "OutOfMemoryError"),
            ("no memory", "MemoryError"),
            ("broken", "RuntimeError"),
        ):
            status, body = ask(url, prompt)
            assert (status, body["error"]["code"]) == (500, "generation_failed")
            assert kind in body["error"]["message"]
            assert ask(url)[0] == 200
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(20) == 0


def test_where_the_device_is_lost_everyone_hears_and_the_process_ends():
    with start() as process:
        url = url_of(process)
        status, body = ask(url, "lost")
        assert (status, body["error"]["code"]) == (500, "engine_dead")
        assert process.wait_for("stuck")["why"] == "the engine has failed"
        assert process.popen.wait(20) == 70


@pytest.mark.parametrize("prompt", ["hang", "hold the loop"])
def test_a_hang_is_reported_with_stacks_and_ends_the_process(prompt):
    with start("--watchdog-timeout", "1") as process, ThreadPoolExecutor(1) as pool:
        url = url_of(process)
        asked = pool.submit(ask, url, prompt)
        entry = process.wait_for("stuck")
        assert entry["running"] == 1
        assert "prompt" in entry["sequences"][0]
        assert "Thread MainThread" in entry["stack"]
        assert process.popen.wait(20) == 70
        if prompt == "hang":
            assert asked.result()[1]["error"]["code"] == "engine_dead"
        else:
            assert "hold_loop" in entry["stack"]
            assert isinstance(asked.exception(), URLError | OSError)


def test_even_what_holds_the_interpreters_lock_is_ended():
    with start("--watchdog-timeout", "1") as process, ThreadPoolExecutor(1) as pool:
        url = url_of(process)
        asked = pool.submit(ask, url, "hold the lock")
        rest = process.rest()
        assert process.popen.returncode == 1
        assert "hold_lock" in rest  # faulthandler's stacks
        assert isinstance(asked.exception(), URLError | OSError)


def test_a_process_that_was_stopped_for_long_goes_on():
    """Its clocks have jumped: nothing was stuck."""
    with start("--watchdog-timeout", "1") as process, ThreadPoolExecutor(1) as pool:
        url = url_of(process)
        process.popen.send_signal(signal.SIGSTOP)
        asked = pool.submit(ask, url)
        time.sleep(3)
        process.popen.send_signal(signal.SIGCONT)
        assert asked.result()[0] == 200
        assert ask(url)[0] == 200


def test_a_full_disk_costs_log_lines_and_no_answer():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, *PROGRAM, "--port", str(port)]
    with Path("/dev/full").open("w") as full, subprocess.Popen(command, stderr=full) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            assert until_up(url)
            assert ask(url)[0] == 200
            with urlopen(f"{url}/metrics") as page:
                text = page.read().decode()
            (line,) = [
                line
                for line in text.splitlines()
                if line.startswith("ruvon_log_lines_dropped_total")
            ]
            assert float(line.split()[1]) >= 3
        finally:
            process.terminate()
        assert process.wait(20) == 0


def until_up(url):
    """Whether the server answers before the test's time limit; asked again and again."""
    while True:
        with suppress(URLError, OSError):
            if urlopen(f"{url}/ready").status == 200:
                return True
        time.sleep(0.05)


FEW_FILES = 96


async def test_a_server_out_of_file_descriptors_goes_on_when_there_are_some_again():
    with start() as process:
        url = url_of(process)
        resource.prlimit(process.popen.pid, resource.RLIMIT_NOFILE, (FEW_FILES, FEW_FILES))
        host, port = url.removeprefix("http://").split(":")
        connections = []
        for _ in range(3 * FEW_FILES):
            with suppress(OSError):
                connections.append(await asyncio.open_connection(host, int(port)))
        await asyncio.sleep(0.5)
        used = len(os.listdir(f"/proc/{process.popen.pid}/fd"))
        assert used >= FEW_FILES - 2
        for _, writer in connections:
            writer.close()
        statuses = []
        while len(statuses) < 40:  # whichever of the listeners takes one
            with suppress(URLError, OSError):
                statuses.append((await asyncio.to_thread(ask, url))[0])
        assert statuses == [200] * 40
        assert process.popen.poll() is None
