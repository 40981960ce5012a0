"""Four replicas on a clock of their own, with real schedulers, caches and the real router, play a
recorded mix of conversations; only what a step takes is made up."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BENCH = HERE.parent.parent / "bench"


@pytest.fixture
def simulate(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("simulate")


def test_a_mix_of_conversations_finds_its_prefixes(simulate):
    recording = importlib.import_module("conversations").read(HERE / "conversations.json")
    cost = simulate.Cost(step=0.01, sequence=2e-4, token=6e-4, context=4e-8)

    def play(name: str):
        route = simulate.ROUTES[name]
        return simulate.Simulation(recording, route, cost=cost, num_blocks=1024).run()

    routed, oracle, in_turns = (play(name) for name in ("router", "oracle", "round robin"))
    turns = sum(len(conversation.turns) for conversation in recording)
    assert len(routed.finished) == len(oracle.finished) == len(in_turns.finished) == turns
    assert routed.hits > 0.9 * oracle.hits
    assert routed.hits > 1.2 * in_turns.hits
    assert 0.85 * routed.hits < routed.promised < 1.05 * routed.hits
    p99, worst = (simulate.percentile(s.first_tokens(), 0.99) for s in (routed, in_turns))
    assert p99 < worst / 2


def test_the_simulated_clock_is_the_cost(simulate):
    """One replica, one conversation: what it takes can be counted by hand."""
    conversations = importlib.import_module("conversations")
    alone = [conversations.Conversation(0.0, 1, 90, [conversations.Turn(0.0, 10, 5)])]
    cost = simulate.Cost(step=1.0, sequence=0.1, token=0.01, context=0.0)
    played = simulate.Simulation(alone, simulate.by_router, replicas=1, cost=cost).run()
    assert played.first_tokens() == [1.0 + 100 * 0.01]
    assert played.now >= 2.0 + 4 * 1.1
