"""The watchdog: what it takes for a hang, what it says of one, and how the process ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from serving import ScriptRunner
from structlog.testing import capture_logs

from ruvon.config import ServerConfig
from ruvon.server.watchdog import Watchdog


class World:
    """A server of which a test says what moves."""

    def __init__(self, patience=3.0):
        self.now = 10.0
        self.turns = []
        self.generator = SimpleNamespace(dead=None, progressed_at=1.0, num_open=1)
        self.state = SimpleNamespace(service=SimpleNamespace(generator=self.generator))
        self.watchdog = Watchdog(self.state, self.turns.append, patience, lambda: self.now)
        self.watchdog.look()

    def look(self, elapsed=1.0, *, step=False, turn=True):
        self.now += elapsed
        self.generator.progressed_at += step
        while turn and self.turns:
            self.turns.pop()()
        return self.watchdog.look()


def test_a_step_that_does_not_end_is_a_hang_in_the_end():
    world = World()
    found = [world.look() for _ in range(5)]
    assert found[:3] == [None] * 3
    assert "no step was finished for 4 seconds" in found[3]


def test_steps_that_end_are_none():
    world = World()
    assert not any(world.look(step=n % 3 == 0) for n in range(30))


def test_nor_is_having_nothing_to_do():
    world = World()
    world.generator.num_open = 0
    assert not any(world.look() for _ in range(30))


def test_an_event_loop_that_does_not_turn_is():
    world = World()
    found = [world.look(step=True, turn=False) for _ in range(5)]
    assert found[:3] == [None] * 3
    assert "the event loop has not turned" in found[3]


def test_time_that_the_process_slept_does_not_count():
    world = World()
    assert world.look(elapsed=10_000) is None
    assert world.look(step=True) is None


def test_an_engine_that_is_dead_is_reported_at_once():
    world = World()
    world.generator.dead = RuntimeError("x")
    assert world.look() == "the engine has failed"


def test_nothing_is_wrong_while_loading():
    world = World()
    world.state.service = None
    assert not any(world.look(turn=False) for _ in range(10))


@pytest.mark.parametrize("stream", [False, True])
async def test_all_who_wait_are_told_and_the_log_says_what_was_going_on(serve, stream):
    server = await serve(runner=ScriptRunner("x" * 50, by_hand=True))
    asked = asyncio.create_task(server.chat(stream=stream))
    await server.until(lambda: server.fake.num_held)
    turn = asyncio.get_running_loop().call_soon_threadsafe
    watchdog = Watchdog(server.state, turn, 1.0)
    with capture_logs() as logs:
        await asyncio.to_thread(watchdog.report, "a step hangs")
        reply = await asked
    assert (reply.status, reply.error["code"]) == (500, "engine_dead")
    (entry,) = (entry for entry in logs if entry["event"] == "stuck")
    assert (entry["why"], entry["running"], entry["in_flight"]) == ("a step hangs", 1, 1)
    assert entry["under_way"] == ["step 1: 21 tokens of 1 sequences"]
    assert "prompt 21, output 0" in entry["sequences"][0]
    assert "Thread MainThread" in entry["stack"]
    assert "selectors.py" in entry["stack"]
    assert (await server.get("/live")).status == 503
    assert (await server.chat()).status == 500
    server.fake.finish_step()


async def test_live_says_stuck_once_patience_is_over(serve, monkeypatch):
    server = await serve(
        runner=ScriptRunner("x", by_hand=True), server=ServerConfig(port=0, watchdog_timeout=7)
    )
    loop = server.service.generator
    clock = SimpleNamespace(now=loop._clock())
    monkeypatch.setattr(loop, "_clock", lambda: clock.now)
    asked = asyncio.create_task(server.chat(max_tokens=1))
    await server.until(lambda: server.fake.num_held)
    assert (await server.get("/live")).status == 200
    clock.now += 8
    stuck = await server.get("/live")
    assert (stuck.status, stuck.json) == (503, {"status": "stuck"})
    await server.finish(asked)
    assert (await server.get("/live")).status == 200
