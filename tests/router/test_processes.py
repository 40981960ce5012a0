"""Replicas as processes: ``ruvon serve --data-parallel-size 2`` as users start it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import AbstractContextManager
from pathlib import Path

import aiohttp
import pytest
from embedded import Process, running
from fakes import TINY_LLAMA
from loads import is_running, load_on, two_cores, until_ready

from ruvon.config import EngineConfig
from ruvon.errors import ConfigError
from ruvon.router.places import Place, places
from ruvon.router.processes import named


def children(process: Process) -> list[int]:
    pid = process.popen.pid
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def replicas(folder: Path, *more: str) -> AbstractContextManager[Process]:
    """Two of a tiny model, behind a router."""
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    return running(
        str(folder), "--load-format", "dummy", "--kernels", "torch", "--kv-cache-memory", "1MiB",
        "--data-parallel-size", "2", "--poll-interval", "0.1", "--no-log-requests", *more,
        anew=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
@two_cores
async def test_no_request_is_lost_to_a_crash_or_a_restart(tmp_path):
    with replicas(tmp_path) as process:
        url = process.wait_for("listening")["url"]
        await until_ready(url, 2)
        workers = children(process)
        assert len(workers) == 2
        shares = [os.sched_getaffinity(worker) for worker in workers]
        assert not shares[0] & shares[1]

        async with load_on(url) as load:
            await asyncio.sleep(0.5)
            os.kill(workers[0], signal.SIGKILL)
            await until_ready(url, 1)
            await until_ready(url, 2)
        assert set(load.outcomes) <= {"whole", "cut"}
        assert load.outcomes["cut"] <= 3  # the streams that it was answering

        async with load_on(url) as load:
            process.popen.send_signal(signal.SIGHUP)
            await asyncio.to_thread(process.wait_for, "rolling_restart_done")
        assert set(load.outcomes) == {"whole"}
        workers = children(process)
        process.popen.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.popen.wait, 60) == 0
        assert not any(map(is_running, workers))


@pytest.mark.slow
@two_cores
async def test_nobody_is_left_behind_whatever_ends_the_router(tmp_path):
    with replicas(tmp_path) as process:
        await until_ready(process.wait_for("listening")["url"], 2)
        workers = children(process)
        process.popen.kill()
        process.popen.wait()
        while any(map(is_running, workers)):  # noqa: ASYNC110 - another process's end
            await asyncio.sleep(0.05)


@pytest.mark.slow
@two_cores
async def test_a_limit_in_tokens_is_that_of_all_replicas_together(tmp_path):
    with replicas(tmp_path, "--rate-limit-tokens", "100") as process:
        url = process.wait_for("listening")["url"]
        await until_ready(url, 2)
        body = {"prompt": [5] * 40, "max_tokens": 20, "ignore_eos": True}
        async with aiohttp.ClientSession() as session:
            statuses = [200]
            while statuses[-1] == 200:
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    told = await answer.json()
                statuses.append(answer.status)
                await asyncio.sleep(0.2)  # two polls
        assert statuses[1:] == [200, 200, 429]
        assert "100 tokens per minute" in told["error"]["message"]


def test_each_replica_has_cores_or_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr("ruvon.engine.resources.allowed_cpus", lambda: list(range(8)))
    on_cpu = EngineConfig(device="cpu")
    third = 1 / 3
    assert places(on_cpu, 3, {}, tmp_path) == [
        Place((0, 1), 2, third), Place((2, 3), 2, third), Place((4, 5), 2, third),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="a core for each"):
        places(on_cpu, 9, {}, tmp_path)
    visible = {"CUDA_VISIBLE_DEVICES": "3,5"}
    placed = places(EngineConfig(tensor_parallel_size=2), 1, visible, tmp_path)
    assert placed == [Place(devices=tuple(visible["CUDA_VISIBLE_DEVICES"].split(",")[:2]))]
    placed = places(EngineConfig(), 2, visible, tmp_path)
    assert [place.devices for place in placed] == [("3",), ("5",)]
    paired = EngineConfig(device="cuda", tensor_parallel_size=2)
    assert places(paired, 1, visible, tmp_path) == [Place(devices=("3", "5"))]
    with pytest.raises(ConfigError, match="there are 2"):
        places(EngineConfig(device="cuda"), 3, visible, tmp_path)
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    assert len(places(EngineConfig(), 2, {}, tmp_path)) == 2


def test_a_line_of_the_log_says_whose_it_is():
    assert json.loads(named('{"event": "ready"}\n', "1")) == {"replica": "1", "event": "ready"}
    assert named("Traceback\n", "1") == "[1] Traceback\n"
