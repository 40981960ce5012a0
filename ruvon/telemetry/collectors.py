"""Collectors that prometheus_client lacks, and the buckets of our histograms."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

_MILLISECONDS = (0.001, 0.0025, 0.005)  # in front of vLLM's buckets, which start too coarse
TOKEN_LATENCY_BUCKETS = (
    *_MILLISECONDS, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
FIRST_TOKEN_BUCKETS = (
    *_MILLISECONDS, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    *_MILLISECONDS, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0,
    15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
LAG_BUCKETS = (*_MILLISECONDS, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
STEP_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def one_two_five(limit: int) -> tuple[int, ...]:
    """Buckets 1, 2, 5, 10, 20, 50, ... up to ``limit``."""
    steps = (factor * 10**power for power in range(19) for factor in (1, 2, 5))
    return tuple(step for step in steps if step <= max(limit, 1))


class Tally(Collector):
    """A histogram to which an observation costs a fraction of a microsecond, however many of equal
    value there are: a step of hundreds of sequences that end makes thousands."""

    def __init__(
        self, name: str, help: str, bounds: Iterable[float], labels: Mapping[str, str]
    ) -> None:
        self._name, self._help, self._labels = name, help, labels
        self._bounds = (*bounds, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[HistogramMetricFamily]:
        names = map(floatToGoString, self._bounds)
        buckets = list(zip(names, map(float, accumulate(self._counts)), strict=True))
        family = HistogramMetricFamily(self._name, self._help, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        yield family


class Watched(Collector):
    """Numbers that somebody else keeps, read when they are asked for: a counter or a gauge, or one
    for each value of the label ``by``."""

    def __init__(
        self,
        name: str,
        help: str,
        read: Callable[[], float | Mapping[str, float]],
        labels: Mapping[str, str],
        *,
        by: str = "",
        family: type[CounterMetricFamily | GaugeMetricFamily] = CounterMetricFamily,
    ) -> None:
        self._name, self._help, self._read, self._labels = name, help, read, labels
        self._by, self._family = by, family

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        names = [*self._labels, self._by] if self._by else [*self._labels]
        family = self._family(self._name, self._help, labels=names)
        found, values = self._read(), [*self._labels.values()]
        if isinstance(found, Mapping):
            for value, number in dict(found).items():
                family.add_metric([*values, value], number)
        else:
            family.add_metric(values, found)
        yield family
