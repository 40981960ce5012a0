"""What a router counts, and what its replicas count, added up."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ruvon.router.fleet import Fleet
from ruvon.router.link import LostError
from ruvon.router.replica import Replica
from ruvon.server.connection import Server
from ruvon.telemetry.collectors import FIRST_TOKEN_BUCKETS, REQUEST_BUCKETS

SUMMED = frozenset({"counter", "histogram", "summary"})  # all others are gauges, one a replica

Key: TypeAlias = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and its labels."""


class RouterMetrics:
    """The router's own numbers. Everything is recorded from the event loop's thread."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        self._requests = self._counter("requests", "Requests answered.", "status")
        self._choices = self._counter(
            "choices", "Requests sent to a replica, by why it was that one.", "replica", "reason"
        )
        self._retries = self._counter(
            "retries", "Requests that a replica refused or lost, and another one got.", "replica"
        )
        self._promised = self._counter(
            "promised_tokens", "Prompt tokens believed to be cached where their request went."
        )
        self._cached = self._counter(
            "cached_tokens", "Prompt tokens that the replicas found in their caches then."
        )
        self._restarts = self._counter("restarts", "Replicas started again.", "replica", "why")
        self._seconds = Histogram(
            "ruvon_router_request_duration_seconds", "Time to answer, streams to their end.",
            registry=self.registry, buckets=REQUEST_BUCKETS,
        )  # fmt: skip
        self._first = Histogram(
            "ruvon_router_first_byte_seconds", "Time to the first byte of an answer.",
            registry=self.registry, buckets=FIRST_TOKEN_BUCKETS,
        )  # fmt: skip
        self.registry.register(Replicas(fleet))

    def count_connections(self, made: Server) -> None:
        """Show how many connections clients have open."""
        opened = Gauge("ruvon_router_connections", "Connections open.", registry=self.registry)
        opened.set_function(made.__len__)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"ruvon_router_{name}", help, labels, registry=self.registry)

    def record(self, status: str, seconds: float) -> None:
        """Count one answered request."""
        self._requests.labels(status).inc()
        self._seconds.observe(seconds)

    def record_first_byte(self, seconds: float) -> None:
        """An answer begins, so long after its request came."""
        self._first.observe(seconds)

    def record_choice(self, replica: str, reason: str) -> None:
        """A request goes to a replica because of ``reason``, as `choose` gives it."""
        self._choices.labels(replica, reason).inc()

    def record_retry(self, replica: str) -> None:
        """A request goes on from a replica that did not answer it."""
        self._retries.labels(replica).inc()

    def record_tokens(self, promised: int, cached: int) -> None:
        """What a replica was believed to have cached of a prompt, and what it had."""
        self._promised.inc(promised)
        self._cached.inc(cached)

    def record_restart(self, replica: str, why: str) -> None:
        """A replica was started again: it had ``ended``, or was to be ``rolled``."""
        self._restarts.labels(replica, why).inc()


GAUGES: Mapping[str, tuple[str, Callable[[Replica], float]]] = {
    "up": ("Whether a replica takes requests.", lambda replica: replica.open),
    "in_flight": ("Requests sent to it that have not ended.", lambda replica: replica.in_flight),
    "load": ("Those, and what others have sent to it.", lambda replica: replica.load),
    "prefixes": ("Pieces of prompts that it is believed to hold.", lambda r: len(r.prefixes)),
}


class Replicas(Collector):
    """How each replica is, when somebody asks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        for name, (help, read) in GAUGES.items():
            family = GaugeMetricFamily(f"ruvon_router_replica_{name}", help, labels=["replica"])
            for replica in self._fleet.replicas:
                family.add_metric([replica.name], float(read(replica)))
            yield family


METRICS = web.AppKey("metrics", RouterMetrics)


@dataclass(slots=True)
class Totals:
    """Sums that do not fall when a replica begins anew: what it had counted before stays."""

    _last: dict[str, dict[Key, float]] = field(default_factory=lambda: defaultdict(dict))
    _gone: dict[Key, float] = field(default_factory=lambda: defaultdict(float))

    def take(self, replica: str, key: Key, value: float) -> None:
        """A replica's counter, as it is now."""
        last = self._last[replica]
        if value < (before := last.get(key, 0.0)):
            self._gone[key] += before
        last[key] = value

    def __getitem__(self, key: Key) -> float:
        return self._gone[key] + sum(last.get(key, 0.0) for last in self._last.values())


class Aggregate(Collector):
    """Many replicas' metrics as one: counters and histograms summed, gauges a replica each."""

    def __init__(self, totals: Totals, texts: Mapping[str, str]) -> None:
        """``texts`` are Prometheus text, by replica."""
        self._totals = totals
        self._families: dict[str, Metric] = {}
        self._summed: dict[str, dict[Key, None]] = defaultdict(dict)
        for replica, text in texts.items():
            for family in text_string_to_metric_families(text):
                self._take(replica, family)

    def _take(self, replica: str, family: Metric) -> None:
        if family.name.endswith("_created"):
            return
        mine = self._families.setdefault(
            family.name, Metric(family.name, family.documentation, family.type)
        )
        for sample in family.samples:
            if family.type in SUMMED:
                key = sample.name, tuple(sample.labels.items())
                self._totals.take(replica, key, sample.value)
                self._summed[family.name][key] = None
            else:
                mine.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)

    def collect(self) -> Iterable[Metric]:
        for name, family in self._families.items():
            for key in self._summed.get(name, ()):
                family.add_sample(key[0], dict(key[1]), self._totals[key])
            yield family


TOTALS = web.AppKey("totals", Totals)


async def render(
    metrics: RouterMetrics, totals: Totals, replicas: Iterable[Replica], key: str | None
) -> bytes:
    """Prometheus text of the router and of all replicas that answer."""
    asked = [replica for replica in replicas if replica.status in ("ready", "draining")]
    texts = dict(
        zip(
            [replica.name for replica in asked],
            await asyncio.gather(*(_text(replica, key) for replica in asked)),
            strict=True,
        )
    )
    own = generate_latest(metrics.registry)
    return own + await asyncio.to_thread(_add_up, totals, texts)


async def _text(replica: Replica, key: str | None) -> str:
    try:
        head, body = await replica.get("/metrics", key)
    except LostError:
        return ""
    return body.decode(errors="replace") if head.status == 200 else ""


def _add_up(totals: Totals, texts: Mapping[str, str]) -> bytes:
    registry = CollectorRegistry()
    registry.register(Aggregate(totals, texts))
    return generate_latest(registry)
