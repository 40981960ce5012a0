"""Start-up beside a listening server: load in a thread, say what was loaded, end in order."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TypeAlias

import structlog
from aiohttp import web

from ruvon import __version__
from ruvon.config import EngineConfig, ServerConfig
from ruvon.engine.kv_cache import MemoryPlan
from ruvon.engine.loop import EngineLoop
from ruvon.engine.startup import LoadedEngine
from ruvon.errors import ConfigError
from ruvon.models.chat import Chat, load_chat, read_template
from ruvon.server import console
from ruvon.server.state import STATE, Service, State
from ruvon.server.threads import in_thread
from ruvon.telemetry import Progress
from ruvon.telemetry.metrics import Metrics
from ruvon.telemetry.totals import Totals, stats_line

log = structlog.get_logger(__name__)

LOADER = "ruvon-load"  # the loading thread
STATS_EVERY = 10.0  # seconds between stats lines, while there is work

Start: TypeAlias = Callable[[EngineConfig, Progress], LoadedEngine]


def engine_context(start: Start) -> Callable[[web.Application], AsyncIterator[None]]:
    """A ``cleanup_ctx``: while the application runs, it loads the engine, then runs its loop."""

    async def context(app: web.Application) -> AsyncIterator[None]:
        state = app[STATE]
        tasks = [asyncio.create_task(load(state, start)), asyncio.create_task(report(state))]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if state.service is not None:
            await state.service.generator.stop(0)
            state.service.close()

    return context


async def load(state: State, start: Start) -> None:
    """Make ``state`` ready, or say in ``state.failure`` why that cannot be and end the server."""
    began = time.monotonic()
    try:
        template = state.server.chat_template
        source = None if template is None else read_template(template)
        loaded = await in_thread(lambda: start_shown(state, start), LOADER)
        chat = loaded.chat if source is None else load_chat(loaded.tokenizer, source)
        service = make_service(loaded, chat, state.server)
    except Exception as error:
        state.failure = error
        state.ended.set()
        return
    service.generator.start()
    state.share, state.service = 1.0, service
    console.announce(
        state.server,
        summary(loaded, service),
        time.monotonic() - began,
        state.address or (state.server.host, state.server.port),
    )


def start_shown(state: State, start: Start) -> LoadedEngine:
    """Start, and show how far it is: to clients, and on the terminal or in the log."""
    with console.loading(state.server) as show:

        def progress(phase: str, share: float) -> None:
            state.progress(phase, share)
            show(phase, share)

        return start(state.engine, progress)


def make_service(loaded: LoadedEngine, chat: Chat, server: ServerConfig) -> Service:
    """What handlers need, out of what start-up made."""
    checkpoint, engine = loaded.checkpoint, loaded.engine
    names = served_names(server.served_model_name or checkpoint.name)
    metrics = Metrics(names[0], engine.max_model_len)
    metrics.describe_cache(
        block_size=engine.config.block_size,
        num_gpu_blocks=loaded.memory.num_blocks,
        kv_cache_size_tokens=loaded.memory.num_tokens,
        cache_dtype=loaded.memory.dtype,
        enable_prefix_caching=engine.config.enable_prefix_caching,
        gpu_memory_utilization=engine.config.gpu_memory_utilization,
    )
    metrics.describe_ranks(loaded.ranks)
    for name, (help, read) in loaded.counters.items():
        metrics.watch(name, help, read)
    generator = EngineLoop(engine, metrics)
    generator.watch(loaded.failed)
    return Service(
        names=names,
        root=str(checkpoint.name),
        format=checkpoint.format,
        generator=generator,
        tokenizer=loaded.tokenizer,
        chat=chat,
        metrics=metrics,
        fingerprint=fingerprint(loaded),
        defaults=loaded.defaults,
        architecture=checkpoint.spec.architecture,
        weight_bytes=loaded.memory.weight_bytes,
        close=loaded.close,
        lens=loaded.lens,
        apart=not server.share_prefix_cache,
    )


def served_names(text: str) -> tuple[str, ...]:
    """``"a, b, a"`` → ``("a", "b")``."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError(f"served_model_name {text!r} holds no name")
    return names


def fingerprint(loaded: LoadedEngine) -> str:
    """``system_fingerprint``: equal where equal requests with a seed get equal answers."""
    parts = (
        __version__, loaded.checkpoint.name, loaded.checkpoint.spec, loaded.engine.config,
        loaded.device, loaded.kernels, loaded.dtype,
    )  # fmt: skip
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def still_loading() -> bool:
    """Whether the loading thread is at work, which `in_thread`'s caller may have given up."""
    return any(thread.name == LOADER for thread in threading.enumerate())


async def report(state: State) -> None:
    """The stats line, after every few seconds in which the engine worked."""
    before = Totals()
    while True:
        began = time.monotonic()
        await asyncio.sleep(STATS_EVERY)
        if state.service is None:
            continue
        metrics, load = state.service.metrics, state.service.generator.load
        if metrics.totals.steps != before.steps:
            metrics.set_load(*load)
            log.info("stats", **stats_line(before, metrics.totals, time.monotonic() - began))
        before = replace(metrics.totals)


def summary(loaded: LoadedEngine, service: Service) -> dict[str, str]:
    """What start-up decided, in words."""
    memory, spec = loaded.memory, loaded.checkpoint.spec
    step = loaded.engine.config.largest_step
    drawn = ", ".join(f"{name} {value}" for name, value in service.defaults.items())
    return {
        "model": ", ".join(service.names),
        "weights": f"{memory.weight_bytes / 1e6:,.1f} MB, {spec.architecture},"
        f" {spec.num_layers} layers",
        "computes_in": f"{loaded.dtype} on {loaded.device}, {loaded.threads} threads,"
        f" kernels {loaded.kernels}{in_ranks(loaded)}",
        "kv_cache": f"{size(memory.cache_bytes)} of {memory.dtype}: {memory.num_blocks} blocks of"
        f" {memory.block_size} tokens{in_groups(memory)}",
        "context": f"{service.max_model_len} tokens; {memory.max_concurrency:.1f} such sequences"
        " fit at once",
        "steps": f"of at most {step.sequences} sequences and {step.tokens} tokens",
        "sampling": f"{drawn or 'temperature 1'} by default",
    }


def in_ranks(loaded: LoadedEngine) -> str:
    """``", 4 ranks in 2 stages"``; nothing where this process computes."""
    stages = loaded.engine.config.pipeline_parallel_size
    if loaded.ranks == 1:
        return ""
    return f", {loaded.ranks} ranks" + (f" in {stages} stages" if stages > 1 else "")


def in_groups(memory: MemoryPlan) -> str:
    """``", in 2 groups that see all, 128"``; nothing where all layers see everything."""
    windows = memory.windows
    if not any(windows):
        return ""
    seen = ", ".join(str(window or "all") for window in windows)
    if len(windows) == 1:
        return f", in 1 group that sees {seen}"
    return f", in {len(windows)} groups that see {seen}"


def size(num_bytes: int) -> str:
    """``1536`` → ``1.5 KiB``."""
    power = max(min((num_bytes.bit_length() - 1) // 10, 4), 0)
    return f"{num_bytes / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
