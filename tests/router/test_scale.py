"""As many replicas as the load wants, and those that end; on sites that have no processes."""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager

import aiohttp
import pytest
from routers import close
from serving import ScriptRunner, Server, open_server

from ruvon.config import RouterConfig, ServerConfig
from ruvon.errors import ConfigError
from ruvon.router import supervisor as supervision
from ruvon.router.app import ROUTING
from ruvon.router.fleet import FLEET
from ruvon.router.run import create_own, run
from ruvon.router.scale import Scale

FOLLOWS = {
    "data_parallel_backend": "ray", "data_parallel_size": 1, "max_replicas": 2,
    "target_ongoing_requests": 2.0, "upscale_delay": 0.0, "downscale_delay": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([20, 20, 20, 20], [2, 2, 2, 4]),  # a second each: not before three are over
        ([20, 20, 3, 20, 20, 20], [2, 2, 2, 2, 2, 2]),  # a burst
        ([500] * 4, [2, 2, 2, 6]),  # no more than may be
        ([0] * 6, [2] * 6),  # no fewer
    ],
)
def test_more_are_wanted_when_the_load_has_been_high(loads, expected):
    config = RouterConfig(
        data_parallel_backend="ray", data_parallel_size=2, max_replicas=6,
        target_ongoing_requests=5.0, upscale_delay=3.0,
    )  # fmt: skip
    scale = Scale(config)
    assert [scale.wanted(float(n), load, 2) for n, load in enumerate(loads)] == expected


def test_fewer_are_wanted_one_at_a_time():
    config = RouterConfig(
        data_parallel_backend="ray",
        max_replicas=6,
        target_ongoing_requests=5.0,
        downscale_delay=2.0,
    )
    scale, count, counts = Scale(config), 5, []
    for second in range(5):
        count = scale.wanted(float(second), 6, count)
        counts.append(count)
    assert counts == [5, 5, 4, 3, 2]


def test_settings_of_rays_are_refused_without_it():
    for name, value in (("ray_address", "auto"), ("max_replicas", 3), ("upscale_delay", 1.0)):
        with pytest.raises(ConfigError, match=f"{name} needs data_parallel_backend 'ray'"):
            RouterConfig(**{name: value})
    with pytest.raises(ConfigError, match="max_replicas 2 must not be less than"):
        RouterConfig(data_parallel_backend="ray", data_parallel_size=3, max_replicas=2)


class Process:
    """Ends by any signal."""

    def __init__(self) -> None:
        self.ended = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        return await asyncio.shield(self.ended)

    def send_signal(self, number: signal.Signals) -> None:
        if not self.ended.done():
            self.ended.set_result(-number)


class Site:
    """Its processes are servers of this one, whose model waits for us at every step."""

    def __init__(self, opened: list[tuple[Process, Server]]) -> None:
        self.opened = opened
        self.closed = False

    @asynccontextmanager
    async def start(self, replica):
        server = await open_server(runner=ScriptRunner("Hello", by_hand=True))
        process = Process()
        self.opened.append((process, server))
        replica.url = server.url
        try:
            yield process
        finally:
            await close(server)

    async def close(self) -> None:
        self.closed = True


async def test_replicas_come_and_go_with_the_load(tmp_path, monkeypatch):
    monkeypatch.setattr(supervision, "LEAST_WAIT", 0.01)
    path = str(tmp_path / "router")
    config = RouterConfig(poll_interval=0.05, **FOLLOWS)
    app, supervisor = create_own(ServerConfig(uds=path, shutdown_timeout=5), config)
    fleet, sites, opened = app[FLEET], [], []

    def make_site() -> Site:
        sites.append(Site(opened))
        return sites[-1]

    async def until(condition) -> None:
        while not condition():  # noqa: ASYNC110 - the test's time limit is the limit
            await asyncio.sleep(0.005)

    supervisor.add("", make_site())
    running = asyncio.create_task(run(app, supervisor, make_site))
    await until(lambda: fleet.num_open == 1)
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path)) as session:

        async def ask() -> int:
            body = {"prompt": "Hi", "max_tokens": 4}
            async with session.post("http://router/v1/completions", json=body) as response:
                await response.read()
                return response.status

        asked = [asyncio.create_task(ask()) for _ in range(4)]
        await until(lambda: fleet.num_open == 2)  # four are two more than one is to have
        assert opened[0][1].num_live == 4

        opened[0][0].send_signal(signal.SIGKILL)  # what it had begun nothing of goes on
        await until(lambda: opened[1][1].num_live == 4)
        await until(lambda: len(opened) == 3 and fleet.num_open == 2)
        async with session.get("http://router/metrics") as response:
            assert 'restarts_total{replica="0",why="ended"} 1.0' in await response.text()

        servers = [server for _, server in opened[1:]]
        while not all(task.done() for task in asked):
            for server in servers:
                if server.fake.num_held:
                    server.fake.finish_step()
            await asyncio.sleep(0)
        assert [task.result() for task in asked] == [200] * 4
        await until(lambda: len(fleet.replicas) == 1)
        await until(lambda: sum(site.closed for site in sites) == 1)
        assert fleet.num_open == 1
    app[ROUTING].ended.set()
    await running
    assert all(site.closed for site in sites)
