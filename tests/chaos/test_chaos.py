"""A short chaos on one server; `make chaos` is longer, and has a fleet, ranks and a real model."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest
from chaos import play, show
from crowd import Odd
from disturbances import break_log, drain, is_excused, stop_for_a_while, stuff_log
from drawn import Case
from folding import fold, is_complete
from scenarios import SCENARIOS
from supervisor import Window

SECONDS = 4.0  # and until everything has been done once
CASE = Case("valid", "/v1/completions", b"{}")


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_server_that_anything_happens_to_is_as_good_as_new():
    """Steps fail at random, the log is stuffed and broken, it is stopped, drained and restarted."""
    disturbances = (stuff_log, drain, stop_for_a_while, break_log)
    scenario = replace(SCENARIOS["server"], disturbances=disturbances, clients=50)
    report = await play("server", scenario, "20261127", SECONDS)
    show(report, scenario, SECONDS)  # seen where it fails
    assert report.problems == []
    assert report.hit > 0
    assert report.counts["valid", "as alone"] > 0
    assert report.done.get("drain", 0) > 0


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_has_its_requests(name):
    drawn = SCENARIOS[name].cases("1", 300)
    assert len(drawn) == 300
    assert any(case.stream for case in drawn)


def test_a_stream_is_folded_to_the_same_however_it_was_cut():
    """But a lost token, an error amid it or another order of choices is another answer."""

    def stream(*deltas):
        events = [
            {"id": str(n), "choices": [{"index": i, "delta": {"content": text}}]}
            for n, (i, text) in enumerate(deltas)
        ]
        data = [b"data: " + orjson.dumps(event) for event in events]
        return b"\n\n".join([*data, b"data: [DONE]", b""])

    whole = stream((0, "abc"), (1, "x"))
    assert fold(True, whole) == fold(True, stream((0, "a"), (1, "x"), (0, "bc")))
    assert fold(True, whole) != fold(True, stream((0, "ac"), (1, "x")))
    assert fold(True, whole) != fold(True, stream((1, "abc"), (0, "x")))
    assert is_complete(whole)
    assert not is_complete(whole[:-20])
    with pytest.raises(ValueError, match="amid a line"):
        fold(True, whole[:-20])


def test_no_wrong_answer_is_excused_and_no_cut_one_by_a_drain():
    drained = Window("drained", 1.0, 5.0, cuts=False)
    killed = Window("killed", 8.0, 9.0)

    def excused(what, began, ended, hit=(), sending=0.0):
        odd = Odd("r1", CASE, "slow", what, "", began, ended, sending)
        return is_excused(odd, [drained, killed], set(hit))

    assert not excused("different", 2.0, 8.5, hit=["r1"])
    assert excused("generation_failed", 2.0, 2.1, hit=["r1"])
    assert not excused("generation_failed", 2.0, 8.5, hit=["r2"])
    assert excused("unanswered", 4.0, 6.0)
    assert not excused("unanswered", 6.0, 7.0)
    assert not excused("cut", 2.0, 4.0)
    assert excused("cut", 7.0, 8.5)
    assert not excused("silence", 7.0, 8.5)
    assert excused("cut", 2.0, 4.9, sending=2.5)
    assert not excused("cut", 6.0, 7.0, sending=2.5)
    assert not excused("request_timeout", 2.0, 60.0)
    assert excused("request_timeout", 2.0, 60.0, sending=21.0)
