"""What an engine and an HTTP server count, for Prometheus.

Names and labels are vLLM's, so that its dashboards and autoscalers work unchanged; each is also
served as ``ruvon_*``. The names are API: docs/reference/metrics.md holds the list, and a test
compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

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
    """What one engine counts. Everything is recorded from the event loop's thread."""

    def __init__(self, model_name: str = "", max_model_len: int = 131072) -> None:
        self.registry = CollectorRegistry()
        self.totals = Totals()
        self._labels = {"model_name": model_name, "engine": "0"}
        self._make_engine_metrics()
        self._make_request_counters()
        self._make_request_histograms(one_two_five(max_model_len))

    def _make_engine_metrics(self) -> None:
        self._running = self._gauge("num_requests_running", "Sequences in the running batch.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences waiting to be scheduled.")
        self._waiting_by = Gauge(
            "vllm:num_requests_waiting_by_reason",
            "Sequences waiting, by what they wait for.",
            [*self._labels, "reason"],
            registry=self.registry,
        ).labels(**self._labels, reason="capacity")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.")
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = self._counter("num_preemptions", "Sequences preempted.")
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed in one step.", STEP_TOKENS_BUCKETS
        )

    def _make_request_counters(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self._output_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._prompt_cached = self._counter("prompt_tokens_cached", "Prompt tokens from the cache.")
        self._prompt_by_source = Counter(
            "vllm:prompt_tokens_by_source",
            "Prompt tokens, by where their keys and values came from.",
            [*self._labels, "source"],
            registry=self.registry,
        )
        self._finished = Counter(
            "vllm:request_success",
            "Sequences finished, by reason.",
            [*self._labels, "finished_reason"],
            registry=self.registry,
        )
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused before they were queued.",
            ["model_name", "reason"],
            registry=self.registry,
        )
        self._waits = Counter(
            "vllm:queue_wait_seconds",
            "Seconds that sequences waited for their first step, by what they waited for.",
            [*self._labels, "reason"],
            registry=self.registry,
        )
        self._corrupted = self._counter(
            "corrupted_requests", "Sequences for which something was computed that is no number."
        )
        for reason in ("stop", "length", "abort", "error", "deadline"):
            self._finished.labels(**self._labels, finished_reason=reason)

    def _make_request_histograms(self, lengths: tuple[int, ...]) -> None:
        self._lengths = {
            name: self._histogram(name, help, lengths)
            for name, help in {
                "request_prompt_tokens": "Prompt length.",
                "request_generation_tokens": "Output length.",
                "request_max_num_generation_tokens": "Longest output of the request.",
                "request_params_max_tokens": "Most tokens asked for.",
                "request_prefill_kv_computed_tokens": "Prompt tokens not found in the cache.",
            }.items()
        }
        self._params_n = self._histogram("request_params_n", "Asked n.", (1, 2, 5, 10, 20))
        self._request_preemptions = self._histogram(
            "request_num_preemptions", "How often a sequence was preempted.", (0, 1, 2, 5, 10, 20)
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_BUCKETS
        )
        self._inter_token = Tally(
            "vllm:inter_token_latency_seconds", "Between two tokens.", TOKEN_LATENCY_BUCKETS,
            self._labels,
        )  # fmt: skip
        self.registry.register(self._inter_token)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time of a request's tokens after the first.",
            TOKEN_LATENCY_BUCKETS,
        )
        self._seconds = {
            name: self._histogram(f"{name}_seconds", help, REQUEST_BUCKETS)
            for name, help in {
                "e2e_request_latency": "Arrival to finish.",
                "request_queue_time": "Arrival to first scheduling.",
                "request_inference_time": "First scheduling to finish.",
                "request_prefill_time": "First scheduling to first token.",
                "request_decode_time": "First token to finish.",
            }.items()
        }

    def _gauge(self, name: str, help: str) -> Gauge:
        gauge = Gauge(f"vllm:{name}", help, list(self._labels), registry=self.registry)
        return gauge.labels(**self._labels)

    def _counter(self, name: str, help: str) -> Counter:
        counter = Counter(f"vllm:{name}", help, list(self._labels), registry=self.registry)
        return counter.labels(**self._labels)

    def _histogram(self, name: str, help: str, buckets: Iterable[float]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", help, list(self._labels), registry=self.registry, buckets=tuple(buckets)
        )
        return histogram.labels(**self._labels)

    def describe_cache(self, **settings: object) -> None:
        """Publish the cache's settings as labels of ``vllm:cache_config_info``, once."""
        labels = {name: str(value) for name, value in settings.items()} | {"engine": "0"}
        Gauge(
            "vllm:cache_config_info", "Settings of the KV cache.", list(labels),
            registry=self.registry,
        ).labels(**labels).set(1)  # fmt: skip

    def describe_ranks(self, count: int) -> None:
        """Publish ``vllm:ranks``, once."""
        self._gauge("ranks", "Processes that compute a step between them.").set(count)

    def watch(self, name: str, help: str, read: Callable[[], int]) -> None:
        """Publish ``vllm:{name}_total``, counted elsewhere. ``read`` is called on any thread."""
        self.registry.register(Watched(f"vllm:{name}", help, read, self._labels))

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
        self.set_load(num_running, num_waiting, kv_usage)
        self._step_tokens.observe(num_tokens)
        if num_queried:
            totals.queried += num_queried
            totals.cached += num_cached
            self._queries.inc(num_queried)
            self._hits.inc(num_cached)
        if num_preempted:
            self._preemptions.inc(num_preempted)

    def set_load(self, num_running: int, num_waiting: int, kv_usage: float) -> None:
        """Set the gauges; between steps too, since sequences come and leave there as well."""
        totals = self.totals
        totals.running, totals.waiting, totals.kv_usage = num_running, num_waiting, kv_usage
        self._running.set(num_running)
        self._waiting.set(num_waiting)
        self._waiting_by.set(num_waiting)
        self._kv_usage.set(kv_usage)

    def record_first_token(self, seconds: float) -> None:
        """Count a sequence's first token, ``seconds`` after it arrived."""
        self._first_token.observe(seconds)
        self._output_tokens.inc()
        self.totals.output_tokens += 1

    def record_inter_token(self, seconds: float, count: int = 1) -> None:
        """Count the later tokens of ``count`` sequences, each ``seconds`` after the one before."""
        self._inter_token.observe(seconds, count)
        self._output_tokens.inc(count)
        self.totals.output_tokens += count

    def record_finished(self, finished: Finished) -> None:
        """Count one completion that ended."""
        self._finished.labels(**self._labels, finished_reason=finished.reason).inc()
        self._corrupted.inc(finished.corrupted)
        num_output = finished.num_output
        for name, value in {
            "request_prompt_tokens": finished.num_prompt,
            "request_prefill_kv_computed_tokens": finished.num_prompt - finished.num_cached,
            "request_generation_tokens": num_output,
            "request_max_num_generation_tokens": num_output,
            "request_params_max_tokens": finished.max_tokens,
        }.items():
            self._lengths[name].observe(value)
        self._params_n.observe(finished.n)
        self._request_preemptions.observe(finished.num_preempted)
        if num_output > 1:
            self._per_token.observe(finished.decode / (num_output - 1))
        for name, seconds in {
            "e2e_request_latency": finished.total,
            "request_queue_time": finished.queue,
            "request_inference_time": finished.prefill + finished.decode,
            "request_prefill_time": finished.prefill,
            "request_decode_time": finished.decode,
        }.items():
            self._seconds[name].observe(seconds)
        for reason, seconds in finished.waits.items():
            self._waits.labels(**self._labels, reason=reason).inc(seconds)

    def record_prompt(self, num_prompt: int, num_cached: int) -> None:
        """Count the tokens of a prompt that is computed now, ``num_cached`` of them found."""
        self.totals.prompt_tokens += num_prompt
        self._prompt_tokens.inc(num_prompt)
        self._prompt_cached.inc(num_cached)
        for source, count in {
            "local_compute": num_prompt - num_cached,
            "local_cache_hit": num_cached,
        }.items():
            self._prompt_by_source.labels(**self._labels, source=source).inc(count)

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
        Gauge(name, help, registry=self.registry).set_function(read)

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
