"""Dashboards and alerts: as they are made, and with a Prometheus to ask, answered."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path

import check_dashboards
import dashboards
import pytest
from serving import open_server

ROOT = Path(__file__).parent.parent
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
MADE = dashboards.dashboards()


@pytest.mark.parametrize("name", MADE)
def test_files_are_as_they_are_made(name: str):
    text = (dashboards.FOLDER / name).read_text()
    assert text == dashboards.render(MADE[name]), "run make docs"


@pytest.mark.parametrize("name", MADE)
def test_panels_have_places_of_their_own(name: str):
    taken: set[tuple[int, int]] = set()
    for panel in MADE[name]["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= dashboards.WIDTH
        assert not cells & taken, panel["title"]
        taken |= cells
    numbers = [panel["id"] for panel in MADE[name]["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_what_is_chosen_is_all_that_queries_leave_open():
    for made in MADE.values():
        for _, _, expression in check_dashboards.queries(made):
            assert "$" not in expression


@pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool")
@pytest.mark.parametrize("what", [["check", "rules", "rules"], ["test", "rules", "tests"]])
def test_alerts_are_sound_and_fire_when_they_should(what: list[str]):
    *command, folder = what
    files = sorted((ROOT / "deploy" / "prometheus" / folder).glob("*.yml"))
    done = subprocess.run([PROMTOOL, *command, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus")
async def test_a_server_answers_all_that_its_dashboard_asks():
    server = await open_server("Hello, you")
    made = json.loads((dashboards.FOLDER / "ruvon.json").read_text())
    targets = {"ruvon": server.url}

    def look() -> list[str]:
        with check_dashboards.prometheus(PROMETHEUS, check_dashboards.free_port(), targets) as url:
            asyncio.run_coroutine_threadsafe(ask_for_a_while(), loop).result()
            found = check_dashboards
            return found.check_variables(url, made) + found.check_panels(url, made)

    async def ask_for_a_while() -> None:
        for number in range(30):
            await server.chat(f"Question {number % 3}", stream=True)
            await asyncio.sleep(0.1)

    loop = asyncio.get_running_loop()
    failures = await asyncio.to_thread(look)
    await server.stack.aclose()
    assert failures == []
