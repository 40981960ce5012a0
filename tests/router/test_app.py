"""What a router answers itself."""

from __future__ import annotations

import re
from pathlib import Path

import ruvon
from ruvon.config import RouterConfig
from ruvon.router.fleet import Fleet
from ruvon.router.metrics import RouterMetrics, Totals

REFERENCE = Path(ruvon.__file__).parent.parent / "docs" / "router.md"


def test_the_reference_lists_every_metric():
    metrics = RouterMetrics(Fleet(RouterConfig()))
    metrics.count_connections([])
    text = "\n".join(f"# TYPE {m.name} {m.type}" for m in metrics.registry.collect())
    served = {
        name + "_total" * (kind == "counter"): kind
        for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE)
    }
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", REFERENCE.read_text(), re.MULTILINE)
    assert dict(rows) == served


def test_a_counter_that_begins_anew_does_not_fall():
    totals = Totals()
    key = ("tokens_total", ())
    for replica, value in (("0", 5.0), ("1", 7.0), ("0", 2.0), ("0", 3.0)):
        totals.take(replica, key, value)
    assert totals[key] == 5 + 7 + 3


async def test_only_admins_see_and_change_what_is_behind(route):
    router = await route(2, key="secret")
    user, admin = {"x-api-key": "secret"}, {"x-api-key": "root"}
    path = "/router/replicas"
    assert (await router.get(path)).status == 401
    assert (await router.get(path, headers=user)).status == 403
    shown = (await router.get(path, headers=admin)).json["data"]
    assert [each["status"] for each in shown] == ["ready", "ready"]
    drained = await router.post(f"{path}/0/drain", headers=admin)
    assert drained.json["status"] == "draining"
    assert (await router.get("/ready")).json["ready"] == 1
    assert (await router.post(f"{path}/0/resume", headers=admin)).json["status"] == "ready"
    assert (await router.post(f"{path}/9/drain", headers=admin)).status == 400
    assert (await router.post("/router/restart", headers=user)).status == 403
    refused = await router.post("/router/restart", headers=admin)
    assert refused.status == 409
    assert refused.error["code"] == "conflict"


async def test_a_keys_limit_is_that_of_all_replicas_together(route):
    router = await route(2, rate_limit=3)
    replies = [await router.complete("Hi") for _ in range(4)]
    assert [reply.status for reply in replies] == [200, 200, 200, 429]
    assert [reply.headers["X-RateLimit-Remaining-Requests"] for reply in replies] == list("2100")
    assert replies[-1].error["code"] == "rate_limit_exceeded"
    assert int(replies[-1].headers["Retry-After"]) >= 1
    assert (await router.get("/v1/models")).status == 200
