"""The application and its life: routes, signals, draining."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Callable
from functools import partial

import structlog
import uvloop
from aiohttp import web

from ruvon.config import EngineConfig, ServerConfig, parse_size
from ruvon.config.server import is_loopback
from ruvon.engine.startup import LoadedEngine, start_engine
from ruvon.server import admin, console, debug, inside, ollama, page, watch
from ruvon.server.body import COMPILER, READER
from ruvon.server.chat import chat_completions
from ruvon.server.completions import completions
from ruvon.server.connection import Runner, Server, expect
from ruvon.server.decisions import decisions
from ruvon.server.embeddings import embeddings
from ruvon.server.explain import explain
from ruvon.server.garbage import keep_for_good
from ruvon.server.keys import KEYS, Keys, read_keys
from ruvon.server.lag import watch_lag
from ruvon.server.lifecycle import Start, engine_context, still_loading
from ruvon.server.listen import allow_files, listen, listen_unix
from ruvon.server.messages_api.handlers import count_tokens, messages
from ruvon.server.middleware import add_request_id, observe
from ruvon.server.openapi import dialects, openapi
from ruvon.server.rate_limits import LIMITS, Ledger, RateLimits
from ruvon.server.reload import WATCHED, reload_now, watch_files, watched
from ruvon.server.render import apply_template, render_chat, render_completions
from ruvon.server.responses_api import handlers as responses
from ruvon.server.responses_api.background import end_background
from ruvon.server.responses_api.store import RESPONSES, ResponseStore
from ruvon.server.resume import KEPT, KeptStreams
from ruvon.server.signals import watch_end, watch_hangup
from ruvon.server.state import STATE, State
from ruvon.server.threads import Aside
from ruvon.server.tls import TLS, Certificate, load_certificate
from ruvon.server.tracing import TRACING, close_tracing
from ruvon.server.watchdog import watching
from ruvon.server.work import REQUESTS, Requests
from ruvon.telemetry import Progress
from ruvon.telemetry.logs import configure_logging
from ruvon.telemetry.tracing import open_tracing

log = structlog.get_logger(__name__)

OTHER_FILES = 512  # that the process has open beside connections: weights, sockets, pipes
GOODBYE = 5.0  # seconds for last bytes to reach slow readers, once all is computed

RESPONSE = "{id:(?!(?:compact|input_tokens)$)[^/]+}"  # what is no route of its own

ROUTES = (
    web.post("/v1/chat/completions", chat_completions, expect_handler=expect),
    web.post("/v1/completions", completions, expect_handler=expect),
    web.post("/v1/chat/completions/render", render_chat, expect_handler=expect),
    web.post("/v1/completions/render", render_completions, expect_handler=expect),
    web.post("/apply-template", apply_template, expect_handler=expect),
    web.post("/v1/embeddings", embeddings, expect_handler=expect),
    web.post("/v1/decisions", decisions, expect_handler=expect),
    web.post("/v1/messages", messages, expect_handler=expect),
    web.post("/v1/messages/count_tokens", count_tokens, expect_handler=expect),
    web.post("/v1/responses", responses.create, expect_handler=expect),
    web.post("/v1/responses/input_tokens", responses.input_tokens, expect_handler=expect),
    web.post("/v1/responses/compact", responses.compact, expect_handler=expect),
    web.get(f"/v1/responses/{RESPONSE}", responses.retrieve),
    web.delete(f"/v1/responses/{RESPONSE}", responses.delete),
    web.post("/v1/responses/{id}/cancel", responses.cancel),
    web.get("/v1/responses/{id}/input_items", responses.input_items),
    web.get("/v1/models", admin.models),
    web.get("/v1/models/{name:.+}", admin.model),
    web.post("/api/chat", ollama.answer, expect_handler=expect),
    web.post("/api/generate", ollama.answer, expect_handler=expect),
    web.get("/api/tags", ollama.tags),
    web.post("/api/show", ollama.show, expect_handler=expect),
    web.get("/api/version", ollama.version),
    web.post("/tokenize", admin.tokenize, expect_handler=expect),
    web.post("/detokenize", admin.detokenize, expect_handler=expect),
    web.get("/tokenizer_info", admin.tokenizer_info),
    web.get("/health", admin.health),
    web.get("/live", admin.live),
    web.get("/ready", admin.ready),
    web.get("/load", admin.load_report),
    web.get("/version", admin.version),
    web.get("/metrics", admin.metrics),
    web.get("/openapi.json", openapi),
    web.get("/v1/requests/{id:.+}/explain", explain),
    web.get("/debug/steps", debug.steps),
    web.get("/about", page.about),
    web.get("/debug/live", watch.live),
    web.post("/debug/gate", watch.gate, expect_handler=expect),
    web.post("/debug/attention", inside.attention, expect_handler=expect),
    web.get("/debug/trace", debug.trace),
    web.get("/debug/recording", debug.recording),
)


def create_app(
    config: EngineConfig,
    server: ServerConfig,
    start: Start = start_engine,
    lines_dropped: Callable[[], int] = lambda: 0,
    fleet_secret: bytes | None = None,
) -> web.Application:
    """The server as an aiohttp application. It answers at once, and loads the engine beside that;
    ``start`` makes the engine, ``lines_dropped`` counts what the log lost, ``fleet_secret`` is that
    of a router that limits tokens. Run it with ``handler_cancellation=True``."""
    state = State(config, server, parse_size(server.max_body_size))
    state.http.watch("ruvon_log_lines_dropped", "Log lines not written.", lines_dropped)
    app = web.Application(middlewares=[observe], client_max_size=state.max_body_size)
    app[STATE] = state
    ledger = None if fleet_secret is None else Ledger(fleet_secret)
    requests, tokens = server.rate_limit_requests, server.rate_limit_tokens
    app[LIMITS] = RateLimits(requests, tokens, ledger=ledger)
    app[KEYS] = keys = Keys(read_keys(server), server.has_page, fleet_secret)
    app[watch.WATCHERS] = set()
    app[TLS] = load_certificate(server)
    app[READER], app[COMPILER] = Aside("ruvon-read"), Aside("ruvon-compile")
    size = parse_size(server.response_store_size)
    app[RESPONSES] = ResponseStore(size, server.response_store_ttl)
    app[REQUESTS] = Requests()
    app.add_routes(ROUTES)
    if server.has_page:
        page.add_page(app)
    app.on_response_prepare.append(add_request_id)
    app.on_cleanup.append(end_background)
    app[KEPT] = KeptStreams(server.resume_grace)
    count_queues(app)
    app.on_cleanup.append(end_reader)
    app.on_cleanup.append(end_kept)
    app[WATCHED] = watched(server, keys, app[TLS])
    app.cleanup_ctx.append(watch_files(app[WATCHED]))
    tracing = open_tracing(server.otlp_traces_endpoint, server.otlp_metrics_endpoint, state.epoch)
    if tracing is not None:
        app[TRACING] = tracing
        app.on_cleanup.append(close_tracing)
    app.cleanup_ctx.append(watch_lag)
    app.cleanup_ctx.append(engine_context(start))
    return app


def count_queues(app: web.Application) -> None:
    """Show how much waits, or is kept, where."""
    state, store = app[STATE], app[RESPONSES]

    def num_arriving() -> int:
        return 0 if state.service is None else state.service.generator.num_arriving

    for name, (help, read) in {
        "arriving": ("Requests that wait to be read, for steps go first.", num_arriving),
        "reading": ("Large bodies in the reading thread's line.", lambda: app[READER].num_waiting),
        "compiling": ("Grammars in the compiler's line.", lambda: app[COMPILER].num_waiting),
        "kept_streams": ("Streams that can be resumed.", app[KEPT].__len__),
        "background_responses": ("Responses in the background.", lambda: len(store.tasks())),
        "stored_responses": ("Responses kept.", lambda: len(store)),
        "stored_response_bytes": ("Their size.", lambda: store.num_bytes),
    }.items():
        state.http.gauge(f"ruvon_{name}", help, read)


async def end_reader(app: web.Application) -> None:
    """What waits to be read has lost its client."""
    for aside in (app[READER], app[COMPILER]):
        aside.close()


async def end_kept(app: web.Application) -> None:
    """Nobody can come back any more."""
    await app[KEPT].close()


def make_runner(app: web.Application) -> web.AppRunner:
    """What runs the application: a client that leaves cancels its handler."""
    state = app[STATE]

    def count(made: Server) -> None:
        state.http.gauge("ruvon_connections", "Connections open.", made.__len__)
        refused = "Connections beyond those that may be open."
        state.http.watch("ruvon_connections_refused", refused, lambda: made.num_refused)

    return Runner(app, state.server, count, shutdown_timeout=GOODBYE)


def serve(config: EngineConfig, server: ServerConfig, fleet_secret: bytes | None = None) -> None:
    """Serve until a signal, then drain; ``fleet_secret`` as for `create_app`. Raises what loading
    raised, and `ConfigError` when the address cannot be listened on."""
    allow_files(server.max_connections + OTHER_FILES)
    sink = configure_logging(server.log_level, server.log_format)
    app = create_app(config, server, start_for_good, lambda: sink.dropped, fleet_secret)
    keep_for_good()  # what was imported, and what loading makes is looked through less often
    try:
        with (
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
            watching(app[STATE], runner.get_loop()),
        ):
            runner.run(run(app))
    finally:
        gc.unfreeze()  # for libraries that look at the end whether they left something behind
    if still_loading():  # in native code, which does not survive the interpreter's tidying up
        os._exit(0)


def start_for_good(config: EngineConfig, progress: Progress) -> LoadedEngine:
    """Start an engine that lives as long as the process, with most of what is made on the way."""
    loaded = start_engine(config, progress)
    keep_for_good()
    return loaded


async def run(app: web.Application) -> None:
    """Listen, wait for the end, leave in order."""
    state = app[STATE]
    runner = make_runner(app)
    await runner.setup()
    try:
        watch_signals(state, partial(reload_now, app[WATCHED]))
        state.address = await listen_as_told(runner, state.server, app[TLS])
        console.tell_address(state.server, *state.address, dialects())
        warn_of_open_door(state.server, state.address[0])
        await state.ended.wait()
        await drain(state)
    finally:
        await runner.cleanup()
    if state.failure is not None:
        raise state.failure


async def listen_as_told(
    runner: web.AppRunner, server: ServerConfig, certificate: Certificate | None
) -> tuple[str, int]:
    """Take connections where the settings say; returns the address. Raises ConfigError."""
    if server.uds is not None:
        await listen_unix(runner, server.uds)
        return "127.0.0.1", server.port
    tls = None if certificate is None else certificate.context
    return await listen(runner, server.host, server.port, tls)


def warn_of_open_door(server: ServerConfig, host: str) -> None:
    """Say so where everybody who reaches this machine may ask."""
    if not server.is_keyed and not is_loopback(host):
        log.warning("open_to_all", host=host, hint="give --api-key, or listen on 127.0.0.1")


def watch_signals(state: State, reload: Callable[[], None]) -> None:
    """The first signal drains, the second ends the process at once."""
    begin = partial(start_draining, state)
    watch_end(lambda: state.draining, begin, partial(end_at_once, state))
    watch_hangup(begin, reload)


def start_draining(state: State, number: signal.Signals) -> None:
    state.draining = True
    state.ended.set()
    log.info(
        "draining",
        signal=number.name,
        unfinished=num_unfinished(state),
        seconds=state.server.shutdown_timeout,
        hint="a second signal ends the server at once",
    )


def num_unfinished(state: State) -> int:
    """Sequences that somebody still waits for."""
    return sum(state.service.generator.load[:2]) if state.service else 0


def end_at_once(state: State, number: signal.Signals) -> None:
    """End the process, and say why and at what cost."""
    try:
        log.warning(
            "ended",
            signal=number.name,
            why="a second signal while draining",
            unfinished=num_unfinished(state),
        )
    finally:
        os._exit(128 + number)


async def drain(state: State) -> None:
    """Let running requests finish; refuse new ones, in words, until then."""
    state.draining = True
    if state.service is not None:
        await state.service.generator.stop(state.server.shutdown_timeout)
        log.info("drained")
