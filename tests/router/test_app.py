"""What a router answers itself."""

from __future__ import annotations

import re
from pathlib import Path

import ruvon
from ruvon.config import RouterConfig
from ruvon.router.fleet import Fleet
from ruvon.router.metrics import RouterMetrics, Totals
from ruvon.server.rate_limits import LIMITS

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


async def test_tokens_are_counted_wherever_they_were_spent(route):
    """Each replica is asked for less than the limit, and both together for more. Other keys have
    limits of their own, though no replica tells whose is whose."""
    router = await route(2, "Hello", key="one", token_limit=100)
    limits, own = router.app[LIMITS], {"headers": {"Authorization": "Bearer one"}}
    for text in ("a" * 60, "b" * 60):
        reply = await router.post("/v1/completions", {"prompt": text}, **own)
        assert reply.status == 200
        assert reply.headers["X-RateLimit-Limit-Tokens"] == "100"
    spent = [server.app[LIMITS].ledger.totals for server in router.replicas]
    assert [[*each.values()] for each in spent] == [[66], [66]]  # END is a token, too
    assert spent[0].keys() == spent[1].keys() != {"one"}
    (tenant,) = limits.tenants
    await router.until(lambda: limits.headers(tenant)["X-RateLimit-Remaining-Tokens"] == "0")
    refused = await router.post("/v1/completions", {"prompt": "c"}, **own)
    assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
    assert "100 tokens per minute" in refused.error["message"]
    assert 1 <= int(refused.headers["Retry-After"]) <= 20
    other = {"headers": {"Authorization": "Bearer root"}}
    assert (await router.post("/v1/completions", {"prompt": "c"}, **other)).status == 200


async def test_who_leaves_has_spent_what_was_written_until_then(route):
    router = await route(1, "x" * 400, token_limit=60)
    ledger, limits = router.replicas[0].app[LIMITS].ledger, router.app[LIMITS]
    async with router.session.post(
        f"{router.url}/v1/completions", json={"prompt": "Hi", "stream": True, "max_tokens": 300}
    ) as answer:
        while sum(ledger.totals.values()) < 80:
            await answer.content.readany()
    await router.until(lambda: limits.headers("")["X-RateLimit-Remaining-Tokens"] == "0")
    assert (await router.complete("Hi")).status == 429
