"""Replicas where Ray puts them. What needs Ray is skipped without it: pip install 'ruvon[ray]'."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from embedded import running
from fakes import TINY_LLAMA
from loads import is_running, load_on, two_cores, until_ready

from ruvon.cli import main
from ruvon.config import EngineConfig
from ruvon.errors import ConfigError
from ruvon.router.actor import Spot
from ruvon.router.cluster import Cluster, Needs, needs_of
from ruvon.router.places import Place

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


def test_without_ray_its_backend_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    said = CliRunner().invoke(main, ["serve", "--data-parallel-backend", "ray", "--threads", "1"])
    assert said.exit_code == 1
    assert "pip install 'ruvon[ray]'" in said.output


def test_what_a_replica_needs():
    assert needs_of(EngineConfig(threads=3), gpus_there=0) == Needs(3, 0)
    assert needs_of(EngineConfig(tensor_parallel_size=2), gpus_there=8) == Needs(1, 2)
    assert needs_of(EngineConfig(device="cpu", threads=2), gpus_there=8) == Needs(2, 0)
    assert needs_of(EngineConfig(device="cuda"), gpus_there=0) == Needs(1, 1)  # they may come
    with pytest.raises(ConfigError, match="needs --threads"):
        needs_of(EngineConfig(), gpus_there=0)


def test_each_replica_has_cores_of_its_own():
    ray = SimpleNamespace(cluster_resources=dict)
    cluster = Cluster(ray, EngineConfig(threads=2), lambda engine, place, **where: place)
    sites = [cluster.site() for _ in range(4)]
    one, other = (Spot(host, 8000, (0, 1, 4, 5, 6)) for host in ("10.0.0.1", "10.0.0.2"))
    assert cluster.tell(sites[0], one) == Place((0, 1), 2, 0.4)
    assert cluster.tell(sites[1], one) == Place((4, 5), 2, 0.4)
    assert cluster.tell(sites[2], other) == Place((0, 1), 2, 0.4)
    assert cluster.tell(sites[3], one).cpus == ()  # Ray knows better, and counts hyperthreads
    cluster.free_cores(sites[0])
    assert cluster.tell(sites[3], one) == Place((0, 1), 2, 0.4)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def workers_of(router: int) -> list[int]:
    """Replicas, which are children of actors, which are Ray's, which is the router's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            above = pid = int(folder.name)
            if b"ruvon.router.worker" in (folder / "cmdline").read_bytes():
                while above not in (0, router):
                    above = parent(above)
                found += [pid] if above else []
    return sorted(found)


@pytest.mark.slow
@pytest.mark.timeout(300)
@needs_ray
@two_cores
async def test_ray_starts_again_what_is_killed_and_scales(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA))
    with running(
        str(tmp_path), "--load-format", "dummy", "--kernels", "torch", "--kv-cache-memory", "1MiB",
        "--data-parallel-backend", "ray", "--threads", "1", "--max-replicas", "2",
        "--target-ongoing-requests", "3", "--upscale-delay", "0.2", "--downscale-delay", "1",
        "--poll-interval", "0.1", "--no-log-requests", anew=True,
    ) as process:  # fmt: skip
        url = process.wait_for("listening")["url"]
        await until_ready(url, 1)
        async with load_on(url) as load:  # six clients
            await until_ready(url, 2)
            workers = workers_of(process.popen.pid)
            assert len(workers) == 2
            os.kill(workers[0], signal.SIGKILL)
            await until_ready(url, 1)
            await until_ready(url, 2)
            actor = parent(workers_of(process.popen.pid)[0])
            os.kill(actor, signal.SIGKILL)  # Ray's own process
            await until_ready(url, 1)
            await until_ready(url, 2)
        assert set(load.outcomes) <= {"whole", "cut"}
        await until_ready(url, 1)
        workers = workers_of(process.popen.pid)
    assert process.popen.returncode == 0
    assert not any(map(is_running, workers))
