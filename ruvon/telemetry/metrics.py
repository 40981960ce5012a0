"""What an engine and an HTTP server count, for Prometheus.

Names and labels are vLLM's, so that its dashboards and autoscalers work unchanged; each is also
served as ``ruvon_*``. The names are API: docs/reference/metrics.md holds the list, and a test
compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ruvon.telemetry.collectors import (
    FIRST_TOKEN_BUCKETS,
    LAG_BUCKETS,
    REQUEST_BUCKETS,
    STEP_TOKENS_BUCKETS,
    TOKEN_LATENCY_BUCKETS,
    Tally,
    Watched,
    one_two_five,
)
from ruvon.telemetry.finished import Finished
from ruvon.telemetry.totals import Totals


class Metrics:
    """What one engine counts. Everything is recorded from the event loop's thread, which steps wait
    for: so what is counted are numbers of ours, and Prometheus reads them when it comes."""

    def __init__(self, model_name: str = "", max_model_len: int = 131072) -> None:
        self.registry = CollectorRegistry()
        self.totals = Totals()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._publish_state()
        self._publish_totals()
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused before they were queued.",
            ["model_name", "reason"],
            registry=self.registry,
        )
        self._make_histograms(one_two_five(max_model_len))

    def _publish_state(self) -> None:
        now, gauge = self.totals, partial(self._publish, family=GaugeMetricFamily)
        gauge("num_requests_running", "Sequences in the running batch.", lambda: now.running)
        gauge("num_requests_waiting", "Sequences waiting to be scheduled.", lambda: now.waiting)
        gauge(
            "num_requests_waiting_by_reason",
            "Sequences waiting, by what they wait for.",
            lambda: {"capacity": now.waiting},
            by="reason",
        )
        gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", lambda: now.kv_usage)

    def _publish_totals(self) -> None:
        now, publish = self.totals, self._publish
        publish("prefix_cache_queries", "Prompt tokens looked up.", lambda: now.queried)
        publish("prefix_cache_hits", "Prompt tokens found in the cache.", lambda: now.cached)
        publish("num_preemptions", "Sequences preempted.", lambda: now.preempted)
        publish("prompt_tokens", "Prompt tokens processed.", lambda: now.prompt_tokens)
        publish("prompt_tokens_cached", "Prompt tokens from the cache.", lambda: now.prompt_cached)
        publish(
            "prompt_tokens_by_source",
            "Prompt tokens, by where their keys and values came from.",
            now.prompt_tokens_by_source,
            by="source",
        )
        publish("generation_tokens", "Tokens generated.", lambda: now.output_tokens)
        publish(
            "request_success",
            "Sequences finished, by reason.",
            lambda: now.finished,
            by="finished_reason",
        )
        publish(
            "queue_wait_seconds",
            "Seconds that sequences waited for their first step, by what they waited for.",
            lambda: now.waits,
            by="reason",
        )
        publish(
            "corrupted_requests",
            "Sequences for which something was computed that is no number.",
            lambda: now.corrupted,
        )

    def _make_histograms(self, lengths: tuple[int, ...]) -> None:
        make, waits = self._histogram, REQUEST_BUCKETS
        self._step_tokens = make(
            "iteration_tokens_total", "Tokens computed in one step.", STEP_TOKENS_BUCKETS
        )
        self._prompt = make("request_prompt_tokens", "Prompt length.", lengths)
        self._computed = make(
            "request_prefill_kv_computed_tokens", "Prompt tokens not found in the cache.", lengths
        )
        self._output = make("request_generation_tokens", "Output length.", lengths)
        self._longest = make(
            "request_max_num_generation_tokens", "Longest output of the request.", lengths
        )
        self._max_tokens = make("request_params_max_tokens", "Most tokens asked for.", lengths)
        self._params_n = make("request_params_n", "Asked n.", (1, 2, 5, 10, 20))
        self._num_preempted = make(
            "request_num_preemptions", "How often a sequence was preempted.", (0, 1, 2, 5, 10, 20)
        )
        self._first_token = make(
            "time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_BUCKETS
        )
        self._inter_token = make(
            "inter_token_latency_seconds", "Between two tokens.", TOKEN_LATENCY_BUCKETS
        )
        self._per_token = make(
            "request_time_per_output_token_seconds",
            "Mean time of a request's tokens after the first.",
            TOKEN_LATENCY_BUCKETS,
        )
        self._total = make("e2e_request_latency_seconds", "Arrival to finish.", waits)
        self._queue = make("request_queue_time_seconds", "Arrival to first scheduling.", waits)
        self._inference = make(
            "request_inference_time_seconds", "First scheduling to finish.", waits
        )
        self._prefill = make(
            "request_prefill_time_seconds", "First scheduling to first token.", waits
        )
        self._decode = make("request_decode_time_seconds", "First token to finish.", waits)

    def _publish(
        self,
        name: str,
        help: str,
        read: Callable[[], float | Mapping[str, float]],
        by: str = "",
        family: type[CounterMetricFamily | GaugeMetricFamily] = CounterMetricFamily,
    ) -> None:
        self.registry.register(
            Watched(f"vllm:{name}", help, read, self._labels, by=by, family=family)
        )

    def _histogram(self, name: str, help: str, buckets: Iterable[float]) -> Tally:
        tally = Tally(f"vllm:{name}", help, buckets, self._labels)
        self.registry.register(tally)
        return tally

    def describe_cache(self, **settings: object) -> None:
        """Publish the cache's settings as labels of ``vllm:cache_config_info``, once."""
        labels = {name: str(value) for name, value in settings.items()} | {"engine": "0"}
        name, help = "vllm:cache_config_info", "Settings of the KV cache."
        info = Watched(name, help, lambda: 1, labels, family=GaugeMetricFamily)
        self.registry.register(info)

    def describe_ranks(self, count: int) -> None:
        """Publish ``vllm:ranks``, once."""
        help = "Processes that compute a step between them."
        self._publish("ranks", help, lambda: count, family=GaugeMetricFamily)

    def watch(self, name: str, help: str, read: Callable[[], int]) -> None:
        """Publish ``vllm:{name}_total``, counted elsewhere. ``read`` is called on any thread."""
        self._publish(name, help, read)

    def record_step(
        self,
        *,
        num_tokens: int,
        num_running: int,
        num_waiting: int,
        kv_usage: float,
        num_cached: int,
        num_queried: int,
        num_preempted: int,
    ) -> None:
        """Count one engine step."""
        totals = self.totals
        totals.steps += 1
        totals.queried += num_queried
        totals.cached += num_cached
        totals.preempted += num_preempted
        self.set_load(num_running, num_waiting, kv_usage)
        self._step_tokens.observe(num_tokens)

    def set_load(self, num_running: int, num_waiting: int, kv_usage: float) -> None:
        """Set the gauges; between steps too, since sequences come and leave there as well."""
        totals = self.totals
        totals.running, totals.waiting, totals.kv_usage = num_running, num_waiting, kv_usage

    def record_first_token(self, seconds: float) -> None:
        """Count a sequence's first token, ``seconds`` after it arrived."""
        self._first_token.observe(seconds)
        self.totals.output_tokens += 1

    def record_inter_token(self, seconds: float, count: int = 1) -> None:
        """Count the later tokens of ``count`` sequences, each ``seconds`` after the one before."""
        self._inter_token.observe(seconds, count)
        self.totals.output_tokens += count

    def record_finished(self, finished: Finished) -> None:
        """Count one completion that ended."""
        self.totals.take(finished)
        num_prompt, num_output = finished.num_prompt, finished.num_output
        self._prompt.observe(num_prompt)
        self._computed.observe(num_prompt - finished.num_cached)
        self._output.observe(num_output)
        self._longest.observe(num_output)
        self._max_tokens.observe(finished.max_tokens)
        self._params_n.observe(finished.n)
        self._num_preempted.observe(finished.num_preempted)
        if num_output > 1:
            self._per_token.observe(finished.decode / (num_output - 1))
        self._total.observe(finished.total)
        self._queue.observe(finished.queue)
        self._inference.observe(finished.prefill + finished.decode)
        self._prefill.observe(finished.prefill)
        self._decode.observe(finished.decode)

    def record_prompt(self, num_prompt: int, num_cached: int) -> None:
        """Count the tokens of a prompt that is computed now, ``num_cached`` of them found."""
        self.totals.prompt_tokens += num_prompt
        self.totals.prompt_cached += num_cached

    def record_rejection(self, reason: str) -> None:
        """Count a request refused because a bound was reached, such as ``max_num_queued_reqs``."""
        self._rejections.labels(model_name=self._labels["model_name"], reason=reason).inc()

    def render(self) -> bytes:
        """Prometheus text: every ``vllm:`` metric, and once more as ``ruvon_``. One of vLLM's names
        says counter and is a histogram; ours does not."""
        text = generate_latest(self.registry)
        own = text.replace(b"vllm:iteration_tokens_total", b"ruvon_iteration_tokens")
        return text + own.replace(b"vllm:", b"ruvon_")


class HttpMetrics:
    """What the HTTP side counts, from before a model is loaded."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "http_requests", "Requests answered.", ["handler", "method", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "http_request_duration_seconds", "Time to answer, streams to their end.",
            ["handler", "method"], registry=self.registry, buckets=REQUEST_BUCKETS,
        )  # fmt: skip
        self._lag = Histogram(
            "ruvon_event_loop_lag_seconds", "How late the event loop comes to what is due.",
            registry=self.registry, buckets=LAG_BUCKETS,
        )  # fmt: skip
        ProcessCollector(registry=self.registry)

    def watch(self, name: str, help: str, read: Callable[[], int]) -> None:
        """Publish ``{name}_total``, counted elsewhere. ``read`` is called on any thread."""
        self.registry.register(Watched(name, help, read, {}))

    def gauge(self, name: str, help: str, read: Callable[[], int]) -> None:
        """Publish ``name``, which goes up and down elsewhere. ``read`` is called on any thread."""
        self.registry.register(Watched(name, help, read, {}, family=GaugeMetricFamily))

    def record(self, handler: str, method: str, status: str, seconds: float) -> None:
        """Count one answered request; ``handler`` is the route, never the raw path."""
        self._requests.labels(handler, method, status).inc()
        self._seconds.labels(handler, method).observe(seconds)

    def record_lag(self, seconds: float) -> None:
        """Something was due on the event loop's thread so long ago."""
        self._lag.observe(seconds)

    def render(self) -> bytes:
        """Prometheus text."""
        return generate_latest(self.registry)
